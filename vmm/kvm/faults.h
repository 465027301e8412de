/* What Python sees of faults.c (cffi's cdef). */

#define TP_DAMAGED ...
#define TF_RUNS ...
#define TF_COMPLETE ...
#define TF_FAILED ...
#define TF_BROKEN ...

/* Features of userfaultfd (linux/userfaultfd.h). */
#define UFFD_FEATURE_MISSING_SHMEM ...
#define UFFD_FEATURE_PAGEFAULT_FLAG_WP ...
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM ...
#define UFFD_FEATURE_THREAD_ID ...

typedef ... tf_server;

struct tf_plan {
    uintptr_t base;     /* of the mapping */
    uint64_t pages;
    int fd;             /* the file; stays the caller's */
    uint64_t offset;    /* of page 0 in it */
    uint64_t *listed;   /* pages that are in the file: read, or filled in by what protects */
    uint32_t *sums;     /* of each page; likewise */
    int ram;            /* the memory object that is mapped; stays the caller's */
    uint32_t patience;  /* ms that `tf_require` waits for a page that comes over a connection */
};

struct tf_report {
    int state;          /* TF_RUNS, TF_COMPLETE, TF_FAILED */
    uint64_t page;      /* after a failure: which one */
    int error;          /* minus an errno, or TP_DAMAGED */
    uint32_t found;     /* after TP_DAMAGED: its checksum */
    uint64_t faults;    /* pages that somebody waited for */
    uint64_t moved;     /* pages of content so far */
    uint64_t passed;    /* pages that are done with, also those that are zero */
    uint64_t asked;     /* pages that the other side was asked for */
    int ours;           /* whether the other side has let the guest go */
};

int tf_probe(uint64_t *features);
tf_server *tf_serve_file(const struct tf_plan *plan, int bell, int *error);
tf_server *tf_protect(const struct tf_plan *plan, int bell, int *error);
int tf_begin_protection(tf_server *server);
tf_server *tf_serve_link(const struct tf_plan *plan, const uint64_t *here, int link, int urgent, uint32_t cpus,
                         int bell, int *error);
uint64_t tf_waited(tf_server *server, uint32_t thread);
int tf_say_loaded(tf_server *server);
void tf_relink(tf_server *server, int link, int urgent);
void tf_here(tf_server *server, uint64_t *here);
int tf_require(tf_server *server, uint64_t first, uint64_t count);
void tf_report(tf_server *server, struct tf_report *report);
void tf_release(tf_server *server);
void tf_free(tf_server *server);
