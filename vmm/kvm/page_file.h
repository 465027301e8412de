/* Pages of guest RAM at fixed places of a file: what saving, loading and faulting in have in common. Included, not built. */

#ifndef TV_PAGE_FILE_H
#define TV_PAGE_FILE_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#include "page_sums.h"

/* Pages that are moved at once: what a CPU has just summed is still in its cache when it is written. */
#define TP_RUN 64u
/* In place of an errno: the content of a page is not what its checksum says. */
#define TP_DAMAGED (-1000)

static inline int tp_has(const uint64_t *bits, uint64_t page)
{
    return (int)(__atomic_load_n(&bits[page / 64], __ATOMIC_ACQUIRE) >> page % 64 & 1);
}

/* Sets a bit; says whether it was set before. */
static inline int tp_add(uint64_t *bits, uint64_t page)
{
    uint64_t bit = 1ull << page % 64;

    return (__atomic_fetch_or(&bits[page / 64], bit, __ATOMIC_ACQ_REL) & bit) != 0;
}

/* Clears a bit; says whether it was set before. */
static inline int tp_drop(uint64_t *bits, uint64_t page)
{
    uint64_t bit = 1ull << page % 64;

    return (__atomic_fetch_and(&bits[page / 64], ~bit, __ATOMIC_ACQ_REL) & bit) != 0;
}

/* CRC-32C (Castagnoli). Every CPU that has virtualization has the instruction. */
__attribute__((target("sse4.2"))) static inline uint32_t tp_crc32c(uint32_t crc, const void *data, uint64_t size)
{
    const uint8_t *at = data;
    uint64_t sum = ~crc;

    for (; size >= 8; size -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        sum = _mm_crc32_u64(sum, word);
    }
    for (; size; size--, at++)
        sum = _mm_crc32_u8((uint32_t)sum, *at);
    return ~(uint32_t)sum;
}

static inline int tp_is_zero(const void *page)
{
    const uint64_t *words = page;

    for (int line = 0; line < 512; line += 8) {
        uint64_t any = 0;
        for (int word = 0; word < 8; word++)
            any |= words[line + word];
        if (any)
            return 0;
    }
    return 1;
}

/* 0, or minus an errno. */
static inline int tp_write(int fd, const void *data, uint64_t size, uint64_t offset)
{
    const char *at = data;

    while (size) {
        ssize_t count = pwrite(fd, at, size, (off_t)offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return count ? -errno : -ENOSPC;
        at += count, offset += (uint64_t)count, size -= (uint64_t)count;
    }
    return 0;
}

/* 0, or minus an errno; ENODATA where the file ends early. */
static inline int tp_read(int fd, void *data, uint64_t size, uint64_t offset)
{
    char *at = data;

    while (size) {
        ssize_t count = pread(fd, at, size, (off_t)offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return count ? -errno : -ENODATA;
        at += count, offset += (uint64_t)count, size -= (uint64_t)count;
    }
    return 0;
}

#endif
