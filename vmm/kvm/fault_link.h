/*
 * The third engine: pages come over a connection, those first that somebody waits for (postcopy). A part of faults.c.
 *
 * What travels is frames of 32 bytes, both ways (docs/migration.md): whoever waits for a page has it asked for, once. If
 * the connection breaks, or what comes is damaged, the server rests (TF_BROKEN): everybody waits on, until it is given
 * another connection. Then what was asked for and has not come is asked for again.
 */

#include <sys/socket.h>
#include <time.h>

#define TL_MAGIC 0x43505654u /* "TVPC" */
#define TL_MOST 64u          /* pages in one frame */

enum { TL_PAGES = 1, TL_ZEROS, TL_SENT, TL_NEED, TL_GOT, TL_RESUME, TL_HAVE, TL_BEGIN, TL_LOADED, TL_REFUSED, TL_YOURS };

struct tl_frame {
    uint32_t magic, kind;
    uint64_t page;
    uint32_t count, zero;
    uint32_t sums; /* CRC-32C of the checksums that follow */
    uint32_t crc;  /* of what is before */
};

static void tl_seal(struct tl_frame *frame)
{
    frame->magic = TL_MAGIC;
    frame->zero = 0;
    frame->crc = tp_crc32c(0, frame, offsetof(struct tl_frame, crc));
}

static int tl_is_whole(const struct tl_frame *frame)
{
    return frame->magic == TL_MAGIC && frame->crc == tp_crc32c(0, frame, offsetof(struct tl_frame, crc));
}

/* Waits until `fd` is ready for `events`; 0, or it is to end, or has broken. */
static int tl_wait(tf_server *server, int fd, short events)
{
    struct pollfd ready[2] = { { .fd = fd, .events = events }, { .fd = server->stop, .events = POLLIN } };

    while (poll(ready, 2, -1) < 0)
        if (errno != EINTR)
            return -errno;
    return ready[1].revents ? -ECANCELED : 0;
}

static int tl_read(tf_server *server, int fd, void *data, uint64_t size)
{
    char *at = data;

    while (size) {
        ssize_t count = recv(fd, at, size, MSG_DONTWAIT);
        if (count > 0) {
            at += count, size -= (uint64_t)count;
            continue;
        }
        if (!count)
            return -EPIPE;
        if (errno == EAGAIN) {
            int error = tl_wait(server, fd, POLLIN);
            if (error)
                return error;
        } else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static int tl_write(tf_server *server, int fd, const void *data, uint64_t size)
{
    const char *at = data;

    while (size) {
        ssize_t count = send(fd, at, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count >= 0) {
            at += count, size -= (uint64_t)count;
            continue;
        }
        if (errno == EAGAIN) {
            int error = tl_wait(server, fd, POLLOUT);
            if (error)
                return error;
        } else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

/* Rests, for what is wrong with a connection. It matters to the first one who says so, and not at the end. */
static void tl_break(tf_server *server, int error)
{
    /* As long as the guest is certainly not ours, nobody is to wait for it: the loop may be, while state is loaded. */
    int gives_up = 0;

    pthread_mutex_lock(&server->lock);
    if (server->report.state == TF_RUNS && error != -ECANCELED) {
        server->report.error = error;
        __atomic_store_n(&server->report.state, TF_BROKEN, __ATOMIC_RELEASE);
        tf_ring(server->bell);
        pthread_cond_broadcast(&server->arrived);
        gives_up = !server->loaded;
    }
    pthread_mutex_unlock(&server->lock);
    if (gives_up)
        tf_unregister(server);
}

/* 0; or -1, and nothing was said: the server rests, or is at its end. */
static int tl_say(tf_server *server, uint32_t kind, uint64_t page, uint32_t count)
{
    struct tl_frame frame = { .kind = kind, .page = page, .count = count };
    int error, says;

    tl_seal(&frame);
    pthread_mutex_lock(&server->saying);
    says = tf_runs(server);
    error = says ? tl_write(server, server->link, &frame, sizeof frame) : 0;
    /* Here, as it is of this connection, and not of one that may follow. */
    if (error)
        tl_break(server, error);
    pthread_mutex_unlock(&server->saying);
    return says ? 0 : -1;
}

/*
 * Asks for a page that somebody waits for, if that has not been done. A page that is known to be zero is put in place only
 * now; one that has come is in place. Here a page is claimed and then looked for, below it is noted and then looked
 * whether it was claimed: one of the two sees the other.
 */
static void tl_ask(tf_server *server, uint64_t page)
{
    int claimed = tp_add(server->claimed, page);

    if (tp_has(server->done, page)) {
        int error = tf_place_zero(server, page);
        if (error)
            tf_end(server, TF_FAILED, page, error, 0);
    } else if (!claimed) {
        tf_note(&server->report.asked, 1);
        tl_say(server, TL_NEED, page, 1);
    }
}

static uint64_t tl_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A thread waits for a page. Called with `lock` held, as the next one. */
static void tl_blocks(tf_server *server, uint32_t thread, uint64_t page)
{
    struct tl_waits *waits = &server->waits;
    uint32_t index = 0;

    while (index < waits->count && waits->of[index].thread != thread)
        index++;
    if (index == TL_THREADS)
        return; /* more than anybody has vCPUs, which are the first ones */
    if (index == waits->count) {
        waits->of[index].thread = thread;
        waits->count++;
    }
    if (waits->of[index].since)
        return; /* it was interrupted, and waits again */
    waits->of[index].page = page;
    waits->of[index].since = tl_now();
    if (++waits->blocked == waits->cpus)
        waits->all_since = waits->of[index].since;
}

static void tl_unblocks(tf_server *server, uint64_t first, uint64_t count)
{
    struct tl_waits *waits = &server->waits;
    uint64_t now = 0;

    for (uint32_t index = 0; index < waits->count; index++)
        if (waits->of[index].since && waits->of[index].page >= first && waits->of[index].page - first < count) {
            now = now ? now : tl_now();
            waits->of[index].total += now - waits->of[index].since;
            waits->of[index].since = 0;
            if (waits->blocked-- == waits->cpus)
                waits->all_total += now - waits->all_since;
        }
}

static void tl_arrived(tf_server *server, uint64_t first, uint64_t count, int data)
{
    for (uint64_t page = first; page < first + count; page++)
        if (!tp_add(server->done, page)) {
            if (data)
                tf_note(&server->report.moved, 1);
            tf_note(&server->report.passed, 1);
        }
    pthread_mutex_lock(&server->lock);
    tl_unblocks(server, first, count);
    pthread_cond_broadcast(&server->arrived);
    pthread_mutex_unlock(&server->lock);
}

/* Takes one frame in. 0, or minus an errno: EBADMSG for what is damaged, EPROTO for what cannot be. */
static int tl_take(tf_server *server, int fd, char *buffer)
{
    struct tl_frame frame;
    uint32_t sums[TL_MOST];
    int error = tl_read(server, fd, &frame, sizeof frame);

    if (error)
        return error;
    if (!tl_is_whole(&frame))
        return -EBADMSG;
    if (frame.kind == TL_YOURS) {
        __atomic_store_n(&server->report.ours, 1, __ATOMIC_RELEASE);
        tf_ring(server->bell);
        return 0;
    }
    if (frame.kind == TL_SENT) {
        /* What was asked for last may still be on its way, over the other connection. */
        pthread_mutex_lock(&server->lock);
        while (server->urgent >= 0 && server->report.state == TF_RUNS && !server->released
               && __atomic_load_n(&server->report.passed, __ATOMIC_ACQUIRE) != server->plan.pages)
            pthread_cond_wait(&server->arrived, &server->lock);
        pthread_mutex_unlock(&server->lock);
        if (__atomic_load_n(&server->report.passed, __ATOMIC_ACQUIRE) != server->plan.pages)
            return tf_runs(server) && !server->released ? -EPROTO : -ECANCELED;
        tl_say(server, TL_GOT, 0, 0);
        tf_end(server, TF_COMPLETE, 0, 0, 0);
        return 0;
    }
    if (frame.page >= server->plan.pages || frame.count > server->plan.pages - frame.page || !frame.count)
        return -EPROTO;
    if (frame.kind == TL_ZEROS) {
        tl_arrived(server, frame.page, frame.count, 0);
        for (uint64_t page = frame.page; !error && page < frame.page + frame.count; page++)
            if (tp_has(server->claimed, page))
                error = tf_place_zero(server, page);
    } else if (frame.kind == TL_PAGES && frame.count <= TL_MOST) {
        error = tl_read(server, fd, sums, frame.count * sizeof *sums);
        if (!error && tp_crc32c(0, sums, frame.count * sizeof *sums) != frame.sums)
            error = -EBADMSG;
        if (!error)
            error = tl_read(server, fd, buffer, (uint64_t)frame.count * TP_PAGE);
        for (uint32_t index = 0; !error && index < frame.count; index++)
            if (tp_crc32c(0, buffer + (uint64_t)index * TP_PAGE, TP_PAGE) != sums[index])
                error = -EBADMSG;
        if (!error)
            error = tf_place(server, frame.page, frame.count, buffer);
        if (!error)
            tl_arrived(server, frame.page, frame.count, 1);
    } else
        error = -EPROTO;
    return error;
}

static void tl_take_all(tf_server *server, int fd)
{
    char *buffer = malloc((uint64_t)TL_MOST * TP_PAGE);
    int error = buffer ? 0 : -ENOMEM;

    while (!error && tf_runs(server))
        error = tl_take(server, fd, buffer);
    free(buffer);
    if (error)
        tl_break(server, error);
}

static void *tl_move(void *arg)
{
    tf_server *server = arg;

    tl_take_all(server, server->link);
    return NULL;
}

static void *tl_rush(void *arg)
{
    tf_server *server = arg;

    tl_take_all(server, server->urgent);
    return NULL;
}

static int tl_begin(tf_server *server)
{
    int error = pthread_create(&server->moving, NULL, tl_move, server);

    server->moves = !error;
    if (!error && server->urgent >= 0) {
        error = pthread_create(&server->rushing, NULL, tl_rush, server);
        server->rushes = !error;
    }
    return -error;
}

/* Has the threads that take pages in end; they rest already, or `stop` has been rung. */
static void tl_join(tf_server *server)
{
    if (server->moves)
        pthread_join(server->moving, NULL);
    if (server->rushes)
        pthread_join(server->rushing, NULL);
    server->moves = server->rushes = 0;
}

/*
 * From now on absent pages, those that are not in `here`, come over `link`, and those that were asked for over `urgent`
 * too, if that is not negative. Both stay the caller's. NULL and minus an errno where that cannot be.
 */
static tf_server *tf_serve_link(const struct tf_plan *plan, const uint64_t *here, int link, int urgent, uint32_t cpus,
                                int bell, int *error)
{
    tf_server *server = tf_make(plan, bell, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID,
                                UFFDIO_REGISTER_MODE_MISSING, error);

    if (!server)
        return NULL;
    server->links = 1;
    server->waits.cpus = cpus;
    server->link = link;
    server->urgent = urgent;
    memcpy(server->done, here, (plan->pages + 63) / 64 * 8);
    for (uint64_t page = 0; page < plan->pages; page++)
        server->report.passed += (uint64_t)tp_has(here, page);
    if ((*error = tf_begin_answering(server)) || (*error = tl_begin(server))) {
        tf_free(server);
        return NULL;
    }
    tl_say(server, TL_BEGIN, 0, 0);
    return server;
}

/* Says that the guest's state is in force here. 0; or -1, and it was not said: the guest is certainly the source's. */
static int tf_say_loaded(tf_server *server)
{
    server->loaded = 1;
    return tl_say(server, TL_LOADED, 0, 0);
}

/* Has a server that rests go on over other connections. Where that cannot be it rests again. */
static void tf_relink(tf_server *server, int link, int urgent)
{
    uint64_t pages = server->plan.pages;
    int error;

    shutdown(server->link, SHUT_RDWR);
    if (server->urgent >= 0)
        shutdown(server->urgent, SHUT_RDWR);
    tl_join(server);
    pthread_mutex_lock(&server->saying); /* whoever still says something over the old ones has failed by then */
    server->link = link;
    server->urgent = urgent;
    pthread_mutex_lock(&server->lock);
    server->report.error = 0;
    __atomic_store_n(&server->report.state, TF_RUNS, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&server->lock);
    pthread_mutex_unlock(&server->saying);
    error = tl_begin(server);
    if (error)
        tl_break(server, error);
    for (uint64_t page = 0; !error && page < pages; page++)
        if (tp_has(server->claimed, page) && !tp_has(server->done, page))
            tl_say(server, TL_NEED, page, 1);
}

/* Waits until a page is here that has been asked for; 0, or it rests, or is at its end, or patience is. */
static int tl_require(tf_server *server, uint64_t page)
{
    uint64_t until = tl_now() + server->plan.patience * 1000000ull;
    struct timespec late = { (time_t)(until / 1000000000u), (long)(until % 1000000000u) };
    int error = 0;

    tl_ask(server, page);
    pthread_mutex_lock(&server->lock);
    while (!error && !tp_has(server->done, page) && server->report.state == TF_RUNS && !server->released)
        error = pthread_cond_timedwait(&server->arrived, &server->lock, &late);
    pthread_mutex_unlock(&server->lock);
    return tp_has(server->done, page) ? 0 : -1;
}

/* Says how long, in ns, a thread has waited all in all, and with `thread` 0 how long all vCPUs have at the same time. */
static uint64_t tf_waited(tf_server *server, uint32_t thread)
{
    struct tl_waits *waits = &server->waits;
    uint64_t found = 0;

    pthread_mutex_lock(&server->lock);
    if (!thread)
        found = waits->all_total + (waits->blocked >= waits->cpus ? tl_now() - waits->all_since : 0);
    for (uint32_t index = 0; index < waits->count; index++)
        if (waits->of[index].thread == thread)
            found = waits->of[index].total + (waits->of[index].since ? tl_now() - waits->of[index].since : 0);
    pthread_mutex_unlock(&server->lock);
    return found;
}

/* Copies what is here: a bit for each page. */
static void tf_here(tf_server *server, uint64_t *here)
{
    memcpy(here, server->done, (server->plan.pages + 63) / 64 * 8);
}
