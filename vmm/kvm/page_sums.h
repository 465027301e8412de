/* Checksums of whole pages, CRC-32C (Castagnoli), several at a time. Included, not built. */

#ifndef TV_PAGE_SUMS_H
#define TV_PAGE_SUMS_H

#include <stdint.h>
#include <immintrin.h>

#define TP_PAGE 4096u
#define TP_WORDS (TP_PAGE / 8)

/* The processor's instruction takes one word a clock, and three clocks for each: four pages at once keep it busy. */
__attribute__((target("sse4.2"))) static inline void tp_crc_4(const uint8_t *page, uint32_t *crcs, uint64_t *ored)
{
    const uint64_t *a = (const void *)page, *b = a + TP_WORDS, *c = b + TP_WORDS, *d = c + TP_WORDS;
    uint64_t p = ~0u, q = ~0u, r = ~0u, s = ~0u, w = 0, x = 0, y = 0, z = 0;

    for (unsigned at = 0; at < TP_WORDS; at++) {
        uint64_t e = a[at], f = b[at], g = c[at], h = d[at];
        p = _mm_crc32_u64(p, e);
        q = _mm_crc32_u64(q, f);
        r = _mm_crc32_u64(r, g);
        s = _mm_crc32_u64(s, h);
        w |= e;
        x |= f;
        y |= g;
        z |= h;
    }
    crcs[0] = ~(uint32_t)p;
    crcs[1] = ~(uint32_t)q;
    crcs[2] = ~(uint32_t)r;
    crcs[3] = ~(uint32_t)s;
    ored[0] = w;
    ored[1] = x;
    ored[2] = y;
    ored[3] = z;
}

__attribute__((target("sse4.2"))) static inline void tp_crc_1(const uint8_t *page, uint32_t *crc, uint64_t *ored)
{
    const uint64_t *words = (const void *)page;
    uint64_t sum = ~0u, all = 0;

    for (unsigned at = 0; at < TP_WORDS; at++) {
        sum = _mm_crc32_u64(sum, words[at]);
        all |= words[at];
    }
    *crc = ~(uint32_t)sum;
    *ored = all;
}

/* For a processor without the instruction: bit by bit would do, but for its speed. */
static inline void tp_crc_plain(const uint8_t *page, uint32_t *crc, uint64_t *ored)
{
    uint32_t table[16];
    uint32_t sum = ~0u;
    uint64_t all = 0;

    for (uint32_t value = 0; value < 16; value++) {
        uint32_t entry = value;
        for (int bit = 0; bit < 4; bit++)
            entry = entry >> 1 ^ (entry & 1 ? 0x82f63b78u : 0);
        table[value] = entry;
    }
    for (unsigned at = 0; at < TP_PAGE; at++) {
        sum ^= page[at];
        sum = sum >> 4 ^ table[sum & 15];
        sum = sum >> 4 ^ table[sum & 15];
        all |= page[at];
    }
    *crc = ~sum;
    *ored = all;
}

static inline int tp_has_crc(void)
{
    return __builtin_cpu_supports("sse4.2");
}

/* Checksums of at most 4 pages; and of each whether it has anything but zeros. */
static inline void tp_crc_pages(const uint8_t *page, unsigned pages, uint32_t *crcs, uint64_t *ored)
{
    if (!tp_has_crc()) {
        for (unsigned at = 0; at < pages; at++)
            tp_crc_plain(page + at * TP_PAGE, crcs + at, ored + at);
    } else if (pages == 4) {
        tp_crc_4(page, crcs, ored);
    } else {
        for (unsigned at = 0; at < pages; at++)
            tp_crc_1(page + at * TP_PAGE, crcs + at, ored + at);
    }
}

#endif
