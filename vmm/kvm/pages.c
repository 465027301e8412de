/* Pages of a guest's RAM on their way: sets of them, their checksums, and the chunks in which they travel.
 *
 * All of this is called without the interpreter's lock, for long stretches of memory. A chunk is what a record of a
 * state stream has of RAM: a table of runs of pages, a checksum for each page, and the pages themselves, which are
 * sent from where they lie. The guest may write to them meanwhile: then a checksum is wrong, and the page is sent
 * again. docs/stream.md has the bytes.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#include "page_sums.h"

#define TV_PAGE TP_PAGE
#define TV_CHUNK_PAGES 256u /* pages with data in one chunk: 1 MiB, which a cache of the second level can hold */
#define TV_CHUNK_RUNS 512u
#define TV_HEAD_ROOM 20u /* bytes of a record's head, before the table */
#define TV_TABLE_FIXED 16u
#define TV_TABLE_LIMIT (TV_TABLE_FIXED + TV_CHUNK_RUNS * 16u + TV_CHUNK_PAGES * 4u)
#define TV_LOOK 16384u /* pages that are looked at in one call */

#define TV_DATA 0u
#define TV_ZERO 1u
#define TV_ENDED (-100000)

/* --- sets of pages ---------------------------------------------------------------------------------------- */

static uint64_t tv_mask_from(uint64_t from)
{
    return ~0ull << (from & 63);
}

static uint64_t tv_mask_to(uint64_t end)
{
    return end & 63 ? ~(~0ull << (end & 63)) : ~0ull;
}

/* Calls `body` with `word`, the index of each word that has bits of [from, end), and `mask`, which of its bits. */
#define TV_EACH_WORD(from, end, body)                                                                                  \
    for (uint64_t word = (from) >> 6; (from) < (end) && word <= ((end)-1) >> 6; word++) {                              \
        uint64_t mask = (word == (from) >> 6 ? tv_mask_from(from) : ~0ull)                                             \
                        & (word == ((end)-1) >> 6 ? tv_mask_to(end) : ~0ull);                                          \
        body                                                                                                           \
    }

static uint64_t tv_map_count(const uint64_t *map, uint64_t from, uint64_t end)
{
    uint64_t count = 0;

    TV_EACH_WORD(from, end, count += (uint64_t)__builtin_popcountll(map[word] & mask);)
    return count;
}

static void tv_map_set(uint64_t *map, uint64_t from, uint64_t end)
{
    TV_EACH_WORD(from, end, map[word] |= mask;)
}

static void tv_map_clear(uint64_t *map, uint64_t from, uint64_t end)
{
    TV_EACH_WORD(from, end, map[word] &= ~mask;)
}

static void tv_map_merge(uint64_t *map, const uint64_t *other, uint64_t from, uint64_t end)
{
    TV_EACH_WORD(from, end, map[word] |= other[word] & mask;)
}

/* The first page from `from` on that is in the set; `end` if none is before it. */
static uint64_t tv_map_next(const uint64_t *map, uint64_t from, uint64_t end)
{
    TV_EACH_WORD(from, end, {
        uint64_t found = map[word] & mask;
        if (found)
            return (word << 6) + (uint64_t)__builtin_ctzll(found);
    })
    return end;
}

/* The first that is not. */
static uint64_t tv_map_next_clear(const uint64_t *map, uint64_t from, uint64_t end)
{
    TV_EACH_WORD(from, end, {
        uint64_t found = ~map[word] & mask;
        if (found)
            return (word << 6) + (uint64_t)__builtin_ctzll(found);
    })
    return end;
}

/* --- checksums: CRC-32C (Castagnoli), RFC 3720 B.4 -------------------------------------------------------- */

/* Checksums of `pages` pages at `address`; returns how many of them are zero, and where asked which. */
static uint64_t tv_checksum_pages(uintptr_t address, uint64_t pages, uint32_t *checksums, uint64_t *zero_map)
{
    uint64_t zeros = 0;

    for (uint64_t at = 0; at < pages; at += 4) {
        unsigned count = pages - at < 4 ? (unsigned)(pages - at) : 4;
        uint64_t ored[4];

        tp_crc_pages((const uint8_t *)address + at * TV_PAGE, count, checksums + at, ored);
        for (unsigned one = 0; one < count; one++) {
            if (!ored[one]) {
                zeros++;
                if (zero_map)
                    zero_map[(at + one) >> 6] |= 1ull << ((at + one) & 63);
            }
        }
    }
    return zeros;
}

/* --- chunks ----------------------------------------------------------------------------------------------- */

struct tv_run {
    uint64_t address;
    uint32_t pages;
    uint32_t kind;
};
struct tv_region {
    uint64_t address;
    uint64_t first;
    uint64_t pages;
};
struct tv_chunk {
    uint32_t runs;
    uint32_t data_pages;
    uint64_t zero_pages;
    uint32_t method;
    uint64_t content;
    uint32_t table_size;
    uint32_t bad_pages;
    uint64_t first_bad; /* guest-physical address */
    uint8_t head[TV_HEAD_ROOM + TV_TABLE_LIMIT];
    uint64_t done; /* bytes that were moved: of head, table and content when it is sent, of content when it comes */
    struct tv_run run[TV_CHUNK_RUNS];
    uint64_t first[TV_CHUNK_RUNS]; /* page with which each run begins */
    uint32_t crc[TV_CHUNK_PAGES];
};

static void tv_chunk_add(struct tv_chunk *chunk, uint64_t page, uint64_t delta, uint32_t kind, uint32_t crc)
{
    struct tv_run *last = chunk->runs ? chunk->run + chunk->runs - 1 : NULL;

    if (last && last->kind == kind && chunk->first[chunk->runs - 1] + last->pages == page) {
        last->pages++;
    } else {
        chunk->run[chunk->runs] = (struct tv_run){ page * TV_PAGE + delta, 1, kind };
        chunk->first[chunk->runs++] = page;
    }
    if (kind == TV_DATA)
        chunk->crc[chunk->data_pages++] = crc;
    else
        chunk->zero_pages++;
}

/* Fills a chunk with pages of the set from `from` on, all of one region, and takes them out of it. Returns the page to
 * go on with: `end` once there is none left. A guest-physical address is a page's place plus `delta`. */
static uint64_t tv_chunk_gather(struct tv_chunk *chunk, uintptr_t base, uint64_t *map, uint64_t from, uint64_t end,
                                uint64_t delta, int find_zeros)
{
    uint64_t page = from, looked = 0;
    uint8_t *table = chunk->head + TV_HEAD_ROOM;

    chunk->runs = chunk->data_pages = 0;
    chunk->zero_pages = 0;
    chunk->done = 0;
    while (looked < TV_LOOK && chunk->data_pages < TV_CHUNK_PAGES) {
        uint32_t crcs[4];
        uint64_t ored[4];
        unsigned count = 1, most = 4;

        page = tv_map_next(map, page, end);
        if (page == end)
            break;
        if (TV_CHUNK_PAGES - chunk->data_pages < most)
            most = TV_CHUNK_PAGES - chunk->data_pages;
        if (TV_CHUNK_RUNS - chunk->runs < most)
            most = TV_CHUNK_RUNS - chunk->runs;
        if (!most)
            break;
        while (count < most && page + count < end && map[(page + count) >> 6] >> ((page + count) & 63) & 1)
            count++;
        /* Out of the set first: what the guest writes from here on puts it in again. */
        tv_map_clear(map, page, page + count);
        tp_crc_pages((const uint8_t *)base + page * TV_PAGE, count, crcs, ored);
        for (unsigned one = 0; one < count; one++)
            tv_chunk_add(chunk, page + one, delta, ored[one] || !find_zeros ? TV_DATA : TV_ZERO, crcs[one]);
        page += count;
        looked += count;
    }
    chunk->method = 0;
    chunk->content = (uint64_t)chunk->data_pages * TV_PAGE;
    chunk->table_size = TV_TABLE_FIXED + chunk->runs * 16u + chunk->data_pages * 4u;
    memcpy(table, &chunk->runs, 4);
    memcpy(table + 4, &chunk->method, 4);
    memcpy(table + 8, &chunk->content, 8);
    memcpy(table + TV_TABLE_FIXED, chunk->run, chunk->runs * 16u);
    memcpy(table + TV_TABLE_FIXED + chunk->runs * 16u, chunk->crc, chunk->data_pages * 4u);
    return page;
}

/* Where the part of `size` bytes at `start` goes on after `done` bytes, as an iovec; how many there are of it. */
static int tv_rest(struct iovec *to, const void *start, uint64_t size, uint64_t *done)
{
    if (*done >= size) {
        *done -= size;
        return 0;
    }
    to->iov_base = (uint8_t *)(uintptr_t)start + *done;
    to->iov_len = size - *done;
    *done = 0;
    return 1;
}

/* Writes what is left of head, table and pages. 1: all of it; 0: no more for now; or minus errno. */
static int tv_chunk_write(struct tv_chunk *chunk, int fd, uintptr_t base)
{
    uint64_t front = TV_HEAD_ROOM + chunk->table_size, total = front + chunk->content;

    while (chunk->done < total) {
        struct iovec parts[TV_CHUNK_PAGES + 1];
        uint64_t done = chunk->done;
        int count = tv_rest(parts, chunk->head, front, &done);
        ssize_t written;

        for (uint32_t at = 0; at < chunk->runs; at++)
            if (chunk->run[at].kind == TV_DATA)
                count += tv_rest(parts + count, (const void *)(base + chunk->first[at] * TV_PAGE),
                                 (uint64_t)chunk->run[at].pages * TV_PAGE, &done);
        written = writev(fd, parts, count);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return errno == EAGAIN ? 0 : -errno;
        chunk->done += (uint64_t)written;
    }
    return 1;
}

/* Takes a table apart that came from somewhere. Returns what is wrong with it, or NULL. */
static const char *tv_chunk_parse(struct tv_chunk *chunk, const uint8_t *table, uint32_t size,
                                  const struct tv_region *regions, uint32_t count)
{
    uint64_t data = 0;

    chunk->done = 0;
    chunk->zero_pages = 0;
    if (size < TV_TABLE_FIXED)
        return "it ends before its numbers";
    memcpy(&chunk->runs, table, 4);
    memcpy(&chunk->method, table + 4, 4);
    memcpy(&chunk->content, table + 8, 8);
    if (!chunk->runs || chunk->runs > TV_CHUNK_RUNS)
        return "it has no run of pages, or too many";
    if (size < TV_TABLE_FIXED + chunk->runs * 16u)
        return "it ends before its last run of pages";
    memcpy(chunk->run, table + TV_TABLE_FIXED, chunk->runs * 16u);
    for (uint32_t at = 0; at < chunk->runs; at++) {
        const struct tv_run *run = chunk->run + at;
        uint32_t region = 0;

        if (run->address % TV_PAGE || !run->pages || run->kind > TV_ZERO)
            return "a run of pages is empty, misaligned or of an unknown kind";
        while (region < count && (run->address < regions[region].address
                                  || (run->address - regions[region].address) / TV_PAGE >= regions[region].pages))
            region++;
        if (region == count)
            return "a run of pages is outside of the guest's RAM";
        chunk->first[at] = (run->address - regions[region].address) / TV_PAGE + regions[region].first;
        if (run->pages > regions[region].first + regions[region].pages - chunk->first[at])
            return "a run of pages goes beyond the guest's RAM";
        if (run->kind == TV_DATA)
            data += run->pages;
        else
            chunk->zero_pages += run->pages;
    }
    if (data > TV_CHUNK_PAGES)
        return "it has too many pages with data";
    if (size != TV_TABLE_FIXED + chunk->runs * 16u + data * 4u)
        return "its size does not fit its runs of pages";
    if (chunk->method > 2)
        return "its content is packed by an unknown method";
    if (chunk->method ? chunk->content > data * TV_PAGE + TV_PAGE : chunk->content != data * TV_PAGE)
        return "the size of its content does not fit its pages";
    chunk->data_pages = (uint32_t)data;
    chunk->table_size = size;
    memcpy(chunk->crc, table + TV_TABLE_FIXED + chunk->runs * 16u, data * 4u);
    return NULL;
}

/* Reads what is left of the content. 1: all of it is there; 0: no more for now; TV_ENDED; or minus errno. */
static int tv_chunk_read(struct tv_chunk *chunk, int fd, uint8_t *buffer)
{
    while (chunk->done < chunk->content) {
        ssize_t count = read(fd, buffer + chunk->done, chunk->content - chunk->done);

        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return errno == EAGAIN ? 0 : -errno;
        if (!count)
            return TV_ENDED;
        chunk->done += (uint64_t)count;
    }
    return 1;
}

/* Compares the pages in `buffer` with their checksums. Those that differ become suspects, which have to come again; all
 * others of the chunk are none any more. Returns how many differ. */
static uint32_t tv_chunk_verify(struct tv_chunk *chunk, const uint8_t *buffer, uint64_t *suspects)
{
    uint32_t at = 0;

    chunk->bad_pages = 0;
    for (uint32_t run = 0; run < chunk->runs; run++) {
        uint64_t page = chunk->first[run], end = page + chunk->run[run].pages;

        tv_map_clear(suspects, page, end);
        if (chunk->run[run].kind != TV_DATA)
            continue;
        while (page < end) {
            uint32_t crcs[4];
            uint64_t ored[4];
            unsigned count = end - page < 4 ? (unsigned)(end - page) : 4;

            tp_crc_pages(buffer + (uint64_t)at * TV_PAGE, count, crcs, ored);
            for (unsigned one = 0; one < count; one++, page++, at++) {
                if (crcs[one] == chunk->crc[at])
                    continue;
                if (!chunk->bad_pages++)
                    chunk->first_bad = chunk->run[run].address + (page - chunk->first[run]) * TV_PAGE;
                tv_map_set(suspects, page, page + 1);
            }
        }
    }
    return chunk->bad_pages;
}

static int tv_put(int fd, const uint8_t *data, uint64_t size, uint64_t offset)
{
    while (size) {
        ssize_t count = pwrite(fd, data, size, (off_t)offset);

        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -errno;
        data += count;
        offset += (uint64_t)count;
        size -= (uint64_t)count;
    }
    return 0;
}

/* Puts the pages into RAM: by writing to its memory object, which neither clears pages first nor maps them; or, where
 * that cannot be written to (huge pages), through the mapping at `base` (else 0). Zeros are put where something else
 * may be, which `received` says. 0, or minus errno. */
static int tv_chunk_store(struct tv_chunk *chunk, const uint8_t *buffer, int fd, uintptr_t base, uint64_t *received)
{
    static const uint8_t zeros[TV_PAGE];
    int error = 0;

    for (uint32_t at = 0; at < chunk->runs && !error; at++) {
        uint64_t page = chunk->first[at], size = (uint64_t)chunk->run[at].pages * TV_PAGE;
        uint64_t end = page + chunk->run[at].pages;

        if (chunk->run[at].kind == TV_DATA) {
            if (base)
                memcpy((void *)(base + page * TV_PAGE), buffer, size);
            else
                error = tv_put(fd, buffer, size, page * TV_PAGE);
            buffer += size;
            tv_map_set(received, page, end);
            continue;
        }
        while (!error && (page = tv_map_next(received, page, end)) < end) {
            if (base)
                memset((void *)(base + page * TV_PAGE), 0, TV_PAGE);
            else
                error = tv_put(fd, zeros, TV_PAGE, page * TV_PAGE);
            page++;
        }
        tv_map_clear(received, chunk->first[at], end);
    }
    return error;
}
