/*
 * Pages of guest RAM that come, or are kept, when they are used (userfaultfd(2)).
 *
 * A server owns a userfaultfd that is registered over the mapping of the RAM, a thread that answers its faults, and one
 * that does the rest meanwhile. Both are C alone: whoever waits for a page may hold the interpreter's lock.
 *
 * One engine answers with pages of a file (`tf_serve_file`), the other keeps pages as they are at one moment, by writing
 * each into a file before it changes (`tf_protect`). What goes wrong is told by the eventfd `bell`, as is the end.
 * Where an absent page cannot be had nobody is answered: the guest must be stopped first, and `tf_release` then lets all
 * who wait go on. Where a page cannot be kept the guest matters more: protection is taken away at once.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include "page_file.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

enum { TF_RUNS, TF_COMPLETE, TF_FAILED, TF_BROKEN };

/* Pages that are read with the one that somebody waits for: who runs in order finds them there. */
#define TF_AHEAD 16u
/* Pages that the other thread moves at once. */
#define TF_PIECE 256u
/* Pages that are let go at once of those that were never used. */
#define TF_UNUSED 32768u

struct tf_plan {
    uintptr_t base;
    uint64_t pages;
    int fd;
    uint64_t offset;
    uint64_t *listed;
    uint32_t *sums;
    int ram;
    uint32_t patience;
};

struct tf_report {
    int state;
    uint64_t page;
    int error;
    uint32_t found;
    uint64_t faults, moved, passed, asked;
    int ours;
};

/* Who waits, and has waited, for pages that come over a connection. */
#define TL_THREADS 512u
struct tl_waits {
    uint32_t count, blocked, cpus;
    uint64_t all_since, all_total; /* ns: when all vCPUs waited */
    struct {
        uint32_t thread;
        uint64_t page, since, total;
    } of[TL_THREADS];
};

typedef struct tf_server tf_server;
struct tf_server {
    struct tf_plan plan;
    int uffd, stop, bell;
    int protects;
    int keeps;          /* the moment has come: until then a protected page that is written is let go, and noted */
    int released;
    uint64_t *done;     /* pages that are here; or that are kept */
    uint64_t *claimed;  /* pages that a thread is keeping, or has kept; before the moment, those that were let go */
    uint64_t hint;      /* the page that was waited for last */
    pthread_mutex_t lock;
    struct tf_report report;
    pthread_t answering, moving, rushing;
    int answers, moves, rushes;
    /* Of pages that come over a connection. */
    struct tl_waits waits;
    int links, link, urgent, loaded;
    pthread_mutex_t saying;
    pthread_cond_t arrived;
};

static void tl_ask(tf_server *server, uint64_t page);
static void tl_blocks(tf_server *server, uint32_t thread, uint64_t page);
static int tl_require(tf_server *server, uint64_t page);
static void tl_arrived(tf_server *server, uint64_t first, uint64_t count, int data);
static void tl_join(tf_server *server);

static int tf_open(void)
{
    int fd = (int)syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    if (fd < 0 && errno == EPERM) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -EPERM;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    return fd < 0 ? -errno : fd;
}

/* 0 and what the kernel's userfaultfd can do, or minus an errno. */
static int tf_probe(uint64_t *features)
{
    struct uffdio_api api = { .api = UFFD_API };
    int fd = tf_open(), error = 0;

    if (fd < 0)
        return fd;
    if (ioctl(fd, UFFDIO_API, &api))
        error = -errno;
    *features = api.features;
    close(fd);
    return error;
}

static void tf_note(uint64_t *counter, uint64_t count)
{
    __atomic_fetch_add(counter, count, __ATOMIC_RELAXED);
}

static void tf_ring(int fd)
{
    uint64_t one = 1;

    if (write(fd, &one, sizeof one) < 0) { /* its counter is full: whoever listens wakes all the same */ }
}

/* Ends the server's work. The first one to call it says why. */
static void tf_end(tf_server *server, int state, uint64_t page, int error, uint32_t found)
{
    pthread_mutex_lock(&server->lock);
    if (server->report.state == TF_RUNS) {
        server->report.page = page;
        server->report.error = error;
        server->report.found = found;
        __atomic_store_n(&server->report.state, state, __ATOMIC_RELEASE);
        tf_ring(server->bell);
        pthread_cond_broadcast(&server->arrived);
    }
    pthread_mutex_unlock(&server->lock);
}

static int tf_runs(const tf_server *server)
{
    return __atomic_load_n(&server->report.state, __ATOMIC_ACQUIRE) == TF_RUNS;
}

static struct uffdio_range tf_range(const tf_server *server, uint64_t first, uint64_t count)
{
    struct uffdio_range range = { server->plan.base + first * TP_PAGE, count * TP_PAGE };

    return range;
}

static void tf_wake(tf_server *server, uint64_t first, uint64_t count)
{
    struct uffdio_range range = tf_range(server, first, count);

    ioctl(server->uffd, UFFDIO_WAKE, &range);
}

static void tf_unregister(tf_server *server)
{
    struct uffdio_range range = tf_range(server, 0, server->plan.pages);

    pthread_mutex_lock(&server->lock);
    if (!server->released) {
        server->released = 1;
        pthread_cond_broadcast(&server->arrived);
        ioctl(server->uffd, UFFDIO_UNREGISTER, &range);
        ioctl(server->uffd, UFFDIO_WAKE, &range); /* which the kernel does for those alone who wait for absent pages */
    }
    pthread_mutex_unlock(&server->lock);
}

/* --- pages from a file -------------------------------------------------------------------------------------- */

/* Puts pages in place, all those that nobody else has put there before. 0, or minus an errno. */
static int tf_place(tf_server *server, uint64_t first, uint64_t count, const char *data)
{
    while (count) {
        struct uffdio_copy copy = {
            .dst = server->plan.base + first * TP_PAGE, .src = (uintptr_t)data, .len = count * TP_PAGE,
        };
        uint64_t took = count;

        if (ioctl(server->uffd, UFFDIO_COPY, &copy)) {
            int error = errno;
            if (copy.copy > 0)
                took = (uint64_t)copy.copy / TP_PAGE;
            else if (error == EEXIST)
                tf_wake(server, first, took = 1);
            else if (error == EAGAIN)
                continue;
            else
                return -error;
        }
        first += took, count -= took, data += took * TP_PAGE;
    }
    return 0;
}

static int tf_place_zero(tf_server *server, uint64_t page)
{
    struct uffdio_zeropage zero = { .range = tf_range(server, page, 1) };

    while (ioctl(server->uffd, UFFDIO_ZEROPAGE, &zero)) {
        if (errno == EEXIST) {
            tf_wake(server, page, 1);
            return 0;
        }
        if (errno != EAGAIN)
            return -errno;
    }
    return 0;
}

/* Reads pages that are in the file, at most TF_PIECE, checks them, and puts them in place. 0, or the server has failed. */
static int tf_fetch(tf_server *server, uint64_t first, uint64_t count, char *buffer)
{
    const struct tf_plan *plan = &server->plan;
    int error = tp_read(plan->fd, buffer, count * TP_PAGE, plan->offset + first * TP_PAGE);

    for (uint64_t page = 0; !error && page < count; page++) {
        uint32_t found = tp_crc32c(0, buffer + page * TP_PAGE, TP_PAGE);
        if (found != plan->sums[first + page]) {
            tf_end(server, TF_FAILED, first + page, TP_DAMAGED, found);
            return -1;
        }
    }
    if (!error)
        error = tf_place(server, first, count, buffer);
    if (error) {
        tf_end(server, TF_FAILED, first, error, 0);
        return -1;
    }
    for (uint64_t page = first; page < first + count; page++)
        if (!tp_add(server->done, page)) {
            tf_note(&server->report.moved, 1);
            tf_note(&server->report.passed, 1);
        }
    return 0;
}

/* How many pages from `first` on are in the file and not here, at most `most`. */
static uint64_t tf_absent(const tf_server *server, uint64_t first, uint64_t most)
{
    uint64_t count = 0;

    while (count < most && first + count < server->plan.pages && tp_has(server->plan.listed, first + count)
           && !tp_has(server->done, first + count))
        count++;
    return count;
}

/* Has one page there, and some that follow. 0, or the server has failed. */
static int tf_have(tf_server *server, uint64_t page, char *buffer)
{
    uint64_t count;
    int error;

    __atomic_store_n(&server->hint, page, __ATOMIC_RELAXED);
    if (tp_has(server->done, page)) {
        tf_wake(server, page, 1);
        return 0;
    }
    count = tf_absent(server, page, TF_AHEAD);
    if (count)
        return tf_fetch(server, page, count, buffer);
    error = tf_place_zero(server, page);
    if (error) {
        tf_end(server, TF_FAILED, page, error, 0);
        return -1;
    }
    if (!tp_add(server->done, page))
        tf_note(&server->report.passed, 1);
    return 0;
}

static void *tf_move_in(void *arg)
{
    tf_server *server = arg;
    uint64_t pages = server->plan.pages, at = 0, hint = UINT64_MAX, behind = 0;
    char *buffer = malloc(TF_PIECE * TP_PAGE);

    if (!buffer)
        tf_end(server, TF_FAILED, 0, -ENOMEM, 0);
    /* From the page that was waited for last onwards; `behind` pages were looked at since then. */
    while (tf_runs(server)) {
        uint64_t now = __atomic_load_n(&server->hint, __ATOMIC_RELAXED), count;
        if (now != hint) {
            hint = at = now;
            behind = 0;
        }
        if (behind >= pages) {
            tf_end(server, TF_COMPLETE, 0, 0, 0);
            break;
        }
        count = tf_absent(server, at, TF_PIECE);
        if (count && tf_fetch(server, at, count, buffer))
            break;
        if (!count)
            count = 1;
        at += count, behind += count;
        if (at >= pages)
            at = 0;
    }
    free(buffer);
    return NULL;
}

/* --- pages kept as they are ---------------------------------------------------------------------------------- */

static int tf_protection(tf_server *server, uint64_t first, uint64_t count, int on)
{
    struct uffdio_writeprotect protect = {
        .range = tf_range(server, first, count), .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };

    while (ioctl(server->uffd, UFFDIO_WRITEPROTECT, &protect))
        if (errno != EAGAIN)
            return -errno;
    return 0;
}

/*
 * Writes pages out that this thread has claimed, and lets the guest write them. 0, or the server has failed. The last one
 * to be done is the end, whichever thread has it: until then the other may be at a page that the guest wants to change.
 * What was never used is zero, and is not looked at, as that would use it.
 */
static int tf_keep(tf_server *server, uint64_t first, uint64_t count, int used)
{
    const struct tf_plan *plan = &server->plan;
    uint64_t start = first, end = first + count;
    int error = 0;

    for (uint64_t page = first; used && !error && page <= end; page++) {
        const char *at = (const char *)plan->base + page * TP_PAGE;
        int take = page < end && !tp_is_zero(at);

        if (take) {
            plan->sums[page] = tp_crc32c(0, at, TP_PAGE);
            tp_add(plan->listed, page);
            tf_note(&server->report.moved, 1);
        }
        if (page > start && (!take || page - start == TP_RUN)) {
            error = tp_write(plan->fd, (const char *)plan->base + start * TP_PAGE, (page - start) * TP_PAGE,
                             plan->offset + start * TP_PAGE);
            start = page;
        }
        if (!take)
            start = page + 1;
    }
    if (!error)
        error = tf_protection(server, first, count, 0);
    if (error) {
        tf_end(server, TF_FAILED, first, error, 0);
        tf_unregister(server);
        return -1;
    }
    if (__atomic_add_fetch(&server->report.passed, count, __ATOMIC_ACQ_REL) == plan->pages)
        tf_end(server, TF_COMPLETE, 0, 0, 0);
    return 0;
}

static void tf_keep_before_write(tf_server *server, uint64_t page)
{
    int keeps;

    pthread_mutex_lock(&server->lock);
    keeps = server->keeps;
    if (!keeps) {
        tp_add(server->claimed, page);
        tf_protection(server, page, 1, 0);
    }
    pthread_mutex_unlock(&server->lock);
    /* Whoever has claimed it before lets the guest write it, or has done so. */
    if (keeps && !tp_add(server->claimed, page))
        tf_keep(server, page, 1, 1);
}

/* Finds the pages from `page` on that were ever used: from `*data` to before `*hole`, which is behind `page`. */
static void tf_find_used(const tf_server *server, uint64_t page, uint64_t *data, uint64_t *hole)
{
    uint64_t pages = server->plan.pages;
    off_t at = lseek(server->plan.ram, (off_t)(page * TP_PAGE), SEEK_DATA), end;

    *data = *hole = pages;
    if (at < 0) {
        if (errno != ENXIO) /* which says that nothing is left */
            *data = page;
    } else if ((uint64_t)at / TP_PAGE < pages) {
        *data = (uint64_t)at / TP_PAGE;
        end = lseek(server->plan.ram, at, SEEK_HOLE);
        if (end > at && ((uint64_t)end + TP_PAGE - 1) / TP_PAGE < pages)
            *hole = ((uint64_t)end + TP_PAGE - 1) / TP_PAGE;
    }
}

static void *tf_move_out(void *arg)
{
    tf_server *server = arg;
    uint64_t pages = server->plan.pages, page = 0, data = 0, hole = 0;

    while (tf_runs(server) && page < pages) {
        uint64_t count = 0, most, end;
        int used;
        /* Those that are used for the first time from here on are written: the other thread has them. */
        if (page >= hole)
            tf_find_used(server, page, &data, &hole);
        used = page >= data;
        most = used ? TP_RUN : TF_UNUSED;
        end = used ? hole : data;
        while (count < most && page + count < end && !tp_add(server->claimed, page + count))
            count++;
        if (count && tf_keep(server, page, count, used))
            return NULL;
        page += count;
        if (count < most && page < end)
            page++; /* it was claimed by the other thread */
    }
    return NULL;
}

/* --- the server ---------------------------------------------------------------------------------------------- */

static void *tf_answer(void *arg)
{
    tf_server *server = arg;
    struct pollfd ready[2] = { { .fd = server->uffd, .events = POLLIN }, { .fd = server->stop, .events = POLLIN } };
    struct uffd_msg messages[16];
    char *buffer = malloc(TF_AHEAD * TP_PAGE);

    if (!buffer)
        tf_end(server, TF_FAILED, 0, -ENOMEM, 0);
    while (buffer) {
        ssize_t size;
        if (poll(ready, 2, -1) < 0) {
            if (errno == EINTR)
                continue;
            tf_end(server, TF_FAILED, 0, -errno, 0);
            break;
        }
        if (ready[1].revents)
            break;
        size = read(server->uffd, messages, sizeof messages);
        if (size < 0)
            continue; /* somebody who waited was killed, or woken */
        for (size_t index = 0; index < (size_t)size / sizeof *messages; index++) {
            uint64_t page = (messages[index].arg.pagefault.address - server->plan.base) / TP_PAGE;
            if (messages[index].event != UFFD_EVENT_PAGEFAULT)
                continue;
            tf_note(&server->report.faults, 1);
            /* What has failed is not answered: see `tf_release`. What is complete may have some last ones waiting. */
            if (__atomic_load_n(&server->report.state, __ATOMIC_ACQUIRE) == TF_FAILED)
                continue;
            if (server->links) {
                pthread_mutex_lock(&server->lock);
                tl_blocks(server, messages[index].arg.pagefault.feat.ptid, page);
                pthread_mutex_unlock(&server->lock);
                tl_ask(server, page);
                if (tp_has(server->done, page))
                    tl_arrived(server, page, 1, 0);
            } else if (server->protects)
                tf_keep_before_write(server, page);
            else
                tf_have(server, page, buffer);
        }
    }
    free(buffer);
    return NULL;
}

static void tf_free(tf_server *server)
{
    tf_unregister(server);
    tf_ring(server->stop);
    if (server->answers)
        pthread_join(server->answering, NULL);
    tl_join(server);
    close(server->uffd);
    close(server->stop);
    pthread_mutex_destroy(&server->lock);
    pthread_mutex_destroy(&server->saying);
    pthread_cond_destroy(&server->arrived);
    free(server->done);
    free(server->claimed);
    free(server);
}

static tf_server *tf_make(const struct tf_plan *plan, int bell, uint64_t features, uint64_t mode, int *error)
{
    uint64_t words = (plan->pages + 63) / 64;
    struct uffdio_api api = { .api = UFFD_API, .features = features };
    struct uffdio_register range = { .mode = mode };
    tf_server *server = calloc(1, sizeof *server);
    pthread_condattr_t clock;

    if (!server) {
        *error = -ENOMEM;
        return NULL;
    }
    server->plan = *plan;
    server->bell = bell;
    server->protects = mode == UFFDIO_REGISTER_MODE_WP;
    server->released = 1; /* nothing is registered yet */
    pthread_mutex_init(&server->lock, NULL);
    pthread_mutex_init(&server->saying, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&server->arrived, &clock);
    pthread_condattr_destroy(&clock);
    server->link = server->urgent = -1;
    server->done = calloc(words, 8);
    server->claimed = calloc(words, 8);
    server->stop = eventfd(0, EFD_CLOEXEC);
    server->uffd = tf_open();
    range.range = tf_range(server, 0, plan->pages);
    if (!server->done || !server->claimed)
        *error = -ENOMEM;
    else if (server->stop < 0)
        *error = -errno;
    else if (server->uffd < 0)
        *error = server->uffd;
    else if (ioctl(server->uffd, UFFDIO_API, &api) || ioctl(server->uffd, UFFDIO_REGISTER, &range))
        *error = -errno;
    else {
        server->released = 0;
        return server;
    }
    tf_free(server);
    return NULL;
}

static int tf_begin_answering(tf_server *server)
{
    int error = pthread_create(&server->answering, NULL, tf_answer, server);

    server->answers = !error;
    return -error;
}

static int tf_begin_moving(tf_server *server, void *(*moving)(void *))
{
    int error = pthread_create(&server->moving, NULL, moving, server);

    server->moves = !error;
    return -error;
}

/* From now on absent pages come from a file. NULL and minus an errno where that cannot be. */
static tf_server *tf_serve_file(const struct tf_plan *plan, int bell, int *error)
{
    tf_server *server = tf_make(plan, bell, UFFD_FEATURE_MISSING_SHMEM, UFFDIO_REGISTER_MODE_MISSING, error);

    if (server && ((*error = tf_begin_answering(server)) || (*error = tf_begin_moving(server, tf_move_in)))) {
        tf_free(server);
        return NULL;
    }
    return server;
}

/*
 * Gets ready to keep pages, while the guest runs: protects all of them, which takes long, and lets go those that are
 * written. NULL and minus an errno where that cannot be.
 */
static tf_server *tf_protect(const struct tf_plan *plan, int bell, int *error)
{
    uint64_t features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    tf_server *server = tf_make(plan, bell, features, UFFDIO_REGISTER_MODE_WP, error);

    if (server && !(*error = tf_begin_answering(server)))
        *error = tf_protection(server, 0, plan->pages, 1);
    if (server && *error) {
        tf_free(server);
        return NULL;
    }
    return server;
}

/* The guest stands: keeps pages as they are now. It may go on when this returns. 0, or minus an errno. */
static int tf_begin_protection(tf_server *server)
{
    uint64_t pages = server->plan.pages;
    int error = 0;

    pthread_mutex_lock(&server->lock);
    for (uint64_t page = 0, run; !error && page < pages; page += run + 1) {
        for (run = 0; page + run < pages && tp_drop(server->claimed, page + run); run++) { }
        if (run)
            error = tf_protection(server, page, run, 1);
        else
            while (page % 64 == 63 && page + 64 < pages && !server->claimed[page / 64 + 1])
                page += 64;
    }
    server->keeps = !error;
    pthread_mutex_unlock(&server->lock);
    if (!error)
        error = tf_begin_moving(server, tf_move_out);
    if (error)
        tf_unregister(server);
    return error;
}

#include "fault_link.h"

/* Has pages there for a thread that is going to use them. 0, or they cannot be had. */
static int tf_require(tf_server *server, uint64_t first, uint64_t count)
{
    char *buffer = malloc(TF_AHEAD * TP_PAGE);
    int failed = !buffer;

    if (failed)
        tf_end(server, TF_FAILED, first, -ENOMEM, 0);
    for (uint64_t page = first; !failed && page < first + count; page++)
        if (server->links)
            failed = tl_require(server, page);
        else if (!tp_has(server->done, page))
            failed = !tf_runs(server) ? server->report.state == TF_FAILED : tf_have(server, page, buffer);
    free(buffer);
    return failed ? -1 : 0;
}

static void tf_report(tf_server *server, struct tf_report *report)
{
    pthread_mutex_lock(&server->lock);
    *report = server->report;
    pthread_mutex_unlock(&server->lock);
}

/* Lets everybody go on who waits. What was absent is zero from here on: no guest may run that needs it. */
static void tf_release(tf_server *server)
{
    tf_unregister(server);
}
