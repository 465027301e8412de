/* What Python sees of mapped.c (cffi's cdef). */

#define TP_DAMAGED ...

struct tm_tally {
    uint64_t data;      /* pages that were moved */
    uint64_t zero;      /* pages that were zero */
    uint64_t page;      /* after a failure: which one */
    uint32_t found;     /* after TP_DAMAGED: its checksum */
};

uint32_t tm_crc32c(uint32_t crc, const void *data, uint64_t size);
int tm_save(uintptr_t base, int fd, uint64_t offset, const uint64_t *wanted, uint64_t *listed, uint32_t *sums,
            uint64_t first, uint64_t count, struct tm_tally *tally);
int tm_load(uintptr_t base, int ram, int fd, uint64_t offset, const uint64_t *listed, const uint32_t *sums,
            uint64_t first, uint64_t count, struct tm_tally *tally);
