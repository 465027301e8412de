/*
 * RAM at fixed places of a file: page n at `offset` + n * 4096, holes where a page is zero. Several threads may be in
 * here, each with pages of its own: `first` is a multiple of 64, as a word of a bitmap has that many.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdlib.h>
#include "page_file.h"

struct tm_tally {
    uint64_t data, zero, page;
    uint32_t found;
};

static uint32_t tm_crc32c(uint32_t crc, const void *data, uint64_t size)
{
    return tp_crc32c(crc, data, size);
}

/* Notes of at most 4 pages, those whose bit is set in `mask`, what they are. 0, or minus an errno. */
static int tm_look(uintptr_t base, int fd, uint64_t offset, uint64_t *listed, uint32_t *sums, uint64_t first,
                   unsigned mask, struct tm_tally *tally)
{
    uint32_t found[4];
    uint64_t ored[4];

    if (mask == 15)
        tp_crc_pages((const uint8_t *)base + first * TP_PAGE, 4, found, ored);
    for (unsigned at = 0; at < 4; at++) {
        uint64_t page = first + at;

        if (!(mask >> at & 1))
            continue;
        if (mask != 15)
            tp_crc_pages((const uint8_t *)base + page * TP_PAGE, 1, found + at, ored + at);
        sums[page] = ored[at] ? found[at] : 0;
        if (ored[at]) {
            tp_add(listed, page);
            tally->data++;
            continue;
        }
        tally->zero++;
        if (tp_drop(listed, page) && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                               (off_t)(offset + page * TP_PAGE), TP_PAGE)) {
            tally->page = page;
            return -errno;
        }
    }
    return 0;
}

/*
 * Writes those pages out whose bit is set in `wanted`, notes in `listed` which are in the file, and their checksums. A
 * page that became zero is a hole again. One that the guest changes meanwhile may get the wrong checksum: it is written
 * again, as it is dirty. 0, or minus an errno, and `page` of the tally is where it happened.
 */
static int tm_save(uintptr_t base, int fd, uint64_t offset, const uint64_t *wanted, uint64_t *listed, uint32_t *sums,
                   uint64_t first, uint64_t count, struct tm_tally *tally)
{
    uint64_t end = first + count;

    for (uint64_t block = first; block < end; block += 64) {
        uint64_t after = block + 64 < end ? block + 64 : end, todo = __atomic_load_n(&wanted[block / 64], __ATOMIC_ACQUIRE);
        int error = 0;

        if (after < block + 64)
            todo &= ~(~0ull << (after - block));
        for (uint64_t page = block; !error && page < after; page += 4)
            error = tm_look(base, fd, offset, listed, sums, page, todo >> (page - block) & 15, tally);
        for (uint64_t page = block, run = 0; !error && page < after; page += run ? run : 1) {
            for (run = 0; page + run < after && todo >> (page + run - block) & 1 && tp_has(listed, page + run); run++)
                ;
            tally->page = page;
            if (run)
                error = tp_write(fd, (const char *)base + page * TP_PAGE, run * TP_PAGE, offset + page * TP_PAGE);
        }
        if (error)
            return error;
    }
    return 0;
}

/*
 * Reads pages that are in the file, compares their checksums, and puts them into memory, which must be zero elsewhere:
 * by way of `ram`, its descriptor, where that is not negative, or straight to `base`, where that is not zero. A page that
 * is written to a memory object is not made zero first, and costs no fault. 0, minus an errno, or TP_DAMAGED.
 */
static int tm_load(uintptr_t base, int ram, int fd, uint64_t offset, const uint64_t *listed, const uint32_t *sums,
                   uint64_t first, uint64_t count, struct tm_tally *tally)
{
    uint64_t end = first + count, page = first;
    char *buffer = base && ram < 0 ? NULL : malloc(TP_RUN * TP_PAGE);
    int error = base && ram < 0 ? 0 : buffer ? 0 : -ENOMEM;

    while (!error && page < end) {
        uint64_t run = 0;
        char *at = buffer ? buffer : (char *)base + page * TP_PAGE;

        while (run < TP_RUN && page + run < end && tp_has(listed, page + run))
            run++;
        if (!run) {
            tally->zero++;
            page++;
            continue;
        }
        tally->page = page;
        error = tp_read(fd, at, run * TP_PAGE, offset + page * TP_PAGE);
        for (uint64_t index = 0; !error && index < run; index += 4) {
            uint32_t found[4];
            uint64_t ored[4], several = run - index < 4 ? run - index : 4;

            tp_crc_pages((const uint8_t *)at + index * TP_PAGE, (unsigned)several, found, ored);
            for (uint64_t one = 0; !error && one < several; one++)
                if (found[one] != sums[page + index + one]) {
                    tally->page = page + index + one;
                    tally->found = found[one];
                    error = TP_DAMAGED;
                }
        }
        if (!error && ram >= 0)
            error = tp_write(ram, at, run * TP_PAGE, page * TP_PAGE);
        tally->data += run;
        page += run;
    }
    free(buffer);
    return error;
}
