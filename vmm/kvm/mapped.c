/*
 * RAM at fixed places of a file: page n at `offset` + n * 4096, holes where a page is zero. Several threads may be in
 * here, each with pages of its own: `first` is a multiple of 64, as a word of a bitmap has that many.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>
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

/* Of a block of 64 pages: whether it was looked at, and by whom it will be. */
enum { TM_NEW, TM_TAKEN, TM_SEEN, TM_BROKEN };

/* Blocks that are looked at before they are written, at most: 2 MiB, which are in a cache of both CPUs until then. */
#define TM_AHEAD 8u

/* Pages for which a thread is worth its start: 8 MiB. A guest that stands has fewer left in most places. */
#define TM_WORTH_A_THREAD 2048u

struct tm_save {
    uintptr_t base;
    int fd;
    uint64_t offset, first, count, blocks;
    const uint64_t *wanted;
    uint64_t *listed;
    uint32_t *sums;
    uint8_t *state;        /* of each block */
    uint64_t written;      /* blocks */
    int over;
    struct tm_tally ahead; /* of the thread that only looks */
    int error;             /* that thread's */
};

/* The pages of a block that are to be saved. */
static uint64_t tm_wanted(const struct tm_save *save, uint64_t block)
{
    uint64_t left = save->count - block * 64;
    uint64_t todo = __atomic_load_n(&save->wanted[save->first / 64 + block], __ATOMIC_ACQUIRE);

    return left < 64 ? todo & ~(~0ull << left) : todo;
}

static uint64_t tm_count_wanted(const struct tm_save *save)
{
    uint64_t pages = 0;

    for (uint64_t block = 0; block < save->blocks; block++)
        pages += (uint64_t)__builtin_popcountll(tm_wanted(save, block));
    return pages;
}

/* Whether the block is the caller's to look at. */
static int tm_take(struct tm_save *save, uint64_t block)
{
    uint8_t none = TM_NEW;

    return __atomic_compare_exchange_n(&save->state[block], &none, TM_TAKEN, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static int tm_look_at_block(struct tm_save *save, uint64_t block, struct tm_tally *tally)
{
    uint64_t todo = tm_wanted(save, block), page = save->first + block * 64;
    int error = 0;

    for (; !error && todo; todo >>= 4, page += 4)
        error = tm_look(save->base, save->fd, save->offset, save->listed, save->sums, page, todo & 15, tally);
    return error;
}

static int tm_write_block(struct tm_save *save, uint64_t block, struct tm_tally *tally)
{
    uint64_t todo = tm_wanted(save, block), first = save->first + block * 64;

    for (uint64_t at = 0, run = 0; at < 64; at += run ? run : 1) {
        for (run = 0; at + run < 64 && todo >> (at + run) & 1 && tp_has(save->listed, first + at + run); run++)
            ;
        tally->page = first + at;
        int error = !run ? 0 : tp_write(save->fd, (const char *)save->base + (first + at) * TP_PAGE, run * TP_PAGE,
                                        save->offset + (first + at) * TP_PAGE);
        if (error)
            return error;
    }
    return 0;
}

/* A thread: looks at blocks ahead of the one that writes them. */
static void *tm_look_ahead(void *argument)
{
    const struct timespec moment = {.tv_nsec = 100000};
    struct tm_save *save = argument;

    for (uint64_t block = 0; block < save->blocks && !__atomic_load_n(&save->over, __ATOMIC_RELAXED);) {
        uint64_t written = __atomic_load_n(&save->written, __ATOMIC_RELAXED);

        if (block < written)
            block = written;
        if (block >= written + TM_AHEAD) {
            nanosleep(&moment, NULL);
        } else if (block < save->blocks && tm_take(save, block)) {
            save->error = tm_look_at_block(save, block, &save->ahead);
            __atomic_store_n(&save->state[block], save->error ? TM_BROKEN : TM_SEEN, __ATOMIC_RELEASE);
            if (save->error)
                break;
        } else {
            block++;
        }
    }
    return NULL;
}

/* Looks at a block, or waits for who is at it. */
static int tm_have_looked_at(struct tm_save *save, uint64_t block, struct tm_tally *tally)
{
    uint8_t state;

    if (tm_take(save, block))
        return tm_look_at_block(save, block, tally);
    while ((state = __atomic_load_n(&save->state[block], __ATOMIC_ACQUIRE)) == TM_TAKEN)
        sched_yield(); /* it may have only this CPU */
    if (state == TM_BROKEN)
        tally->page = save->ahead.page;
    return state == TM_BROKEN ? save->error : 0;
}

/*
 * Writes those pages out whose bit is set in `wanted`, notes in `listed` which are in the file, and their checksums. A
 * page that became zero is a hole again. One that the guest changes meanwhile may get the wrong checksum: it is written
 * again, as it is dirty. 0, or minus an errno, and `page` of the tally is where it happened.
 *
 * Of much, a second thread, if there can be one, finds the checksums of what comes next. It does not write: a file has one writer
 * at a time, and those that wait keep CPUs busy.
 */
static int tm_save(uintptr_t base, int fd, uint64_t offset, const uint64_t *wanted, uint64_t *listed, uint32_t *sums,
                   uint64_t first, uint64_t count, struct tm_tally *tally)
{
    struct tm_save save = {
        .base = base, .fd = fd, .offset = offset, .first = first, .count = count, .blocks = (count + 63) / 64,
        .wanted = wanted, .listed = listed, .sums = sums,
    };
    pthread_t looker;
    int error = 0;

    save.state = calloc(save.blocks, 1);
    if (save.blocks && !save.state)
        return -ENOMEM;
    int alone = tm_count_wanted(&save) < TM_WORTH_A_THREAD || pthread_create(&looker, NULL, tm_look_ahead, &save);
    for (uint64_t block = 0; !error && block < save.blocks; block++) {
        error = tm_have_looked_at(&save, block, tally);
        if (!error)
            error = tm_write_block(&save, block, tally);
        __atomic_store_n(&save.written, block + 1, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&save.over, 1, __ATOMIC_RELAXED);
    if (!alone)
        pthread_join(looker, NULL);
    tally->data += save.ahead.data;
    tally->zero += save.ahead.zero;
    free(save.state);
    return error;
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
