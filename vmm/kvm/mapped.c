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

/*
 * Writes those pages out whose bit is set in `wanted`, notes in `listed` which are in the file, and their checksums. A
 * page that became zero is a hole again. One that the guest changes meanwhile may get the wrong checksum: it is written
 * again, as it is dirty. 0, or minus an errno, and `page` of the tally is where it happened.
 */
static int tm_save(uintptr_t base, int fd, uint64_t offset, const uint64_t *wanted, uint64_t *listed, uint32_t *sums,
                   uint64_t first, uint64_t count, struct tm_tally *tally)
{
    uint64_t end = first + count, start = first, page = first;

    while (page < end) {
        const char *at = (const char *)base + page * TP_PAGE;
        int error = 0, take = 0;

        if (!(page % 64) && !__atomic_load_n(&wanted[page / 64], __ATOMIC_ACQUIRE)) {
            page = page + 64 < end ? page + 64 : end;
            start = page;
            continue;
        }
        if (tp_has(wanted, page)) {
            if (tp_is_zero(at)) {
                tally->zero++;
                if (tp_drop(listed, page) && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                                       (off_t)(offset + page * TP_PAGE), TP_PAGE))
                    error = -errno;
                sums[page] = 0;
            } else {
                sums[page] = tp_crc32c(0, at, TP_PAGE);
                tp_add(listed, page);
                tally->data++;
                take = 1;
            }
        }
        page += (uint64_t)take;
        if (!error && page > start && (!take || page - start == TP_RUN || page == end || !(page % 64))) {
            error = tp_write(fd, (const char *)base + start * TP_PAGE, (page - start) * TP_PAGE,
                             offset + start * TP_PAGE);
            start = page;
        }
        if (!take)
            start = ++page;
        if (error) {
            tally->page = start < end ? start : end - 1;
            return error;
        }
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
        for (uint64_t index = 0; !error && index < run; index++) {
            uint32_t found = tp_crc32c(0, at + index * TP_PAGE, TP_PAGE);
            if (found != sums[page + index]) {
                tally->page = page + index;
                tally->found = found;
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
