/* What Python sees of pages.c (cffi's cdef). Pages are numbered by their place in the guest's RAM, all regions in a row. */

#define TV_PAGE ...
#define TV_CHUNK_PAGES ...
#define TV_CHUNK_RUNS ...
#define TV_HEAD_ROOM ...
#define TV_TABLE_LIMIT ...
#define TV_DATA ...
#define TV_ZERO ...
#define TV_ENDED ...

/* --- sets of pages ---------------------------------------------------------------------------------------- */

uint64_t tv_map_count(const uint64_t *map, uint64_t from, uint64_t end);
void tv_map_set(uint64_t *map, uint64_t from, uint64_t end);
void tv_map_clear(uint64_t *map, uint64_t from, uint64_t end);
void tv_map_merge(uint64_t *map, const uint64_t *other, uint64_t from, uint64_t end);
uint64_t tv_map_next(const uint64_t *map, uint64_t from, uint64_t end);
uint64_t tv_map_next_clear(const uint64_t *map, uint64_t from, uint64_t end);

/* --- checksums -------------------------------------------------------------------------------------------- */

uint64_t tv_checksum_pages(uintptr_t address, uint64_t pages, uint32_t *checksums, uint64_t *zero_map);

/* --- chunks ----------------------------------------------------------------------------------------------- */

struct tv_run { uint64_t address; uint32_t pages; uint32_t kind; };
struct tv_region { uint64_t address; uint64_t first; uint64_t pages; };
struct tv_chunk {
    uint32_t runs;
    uint32_t data_pages;
    uint64_t zero_pages;
    uint32_t method;
    uint64_t content;
    uint32_t table_size;
    uint32_t bad_pages;
    uint64_t first_bad;
    uint8_t head[...];
    uint64_t done;
    struct tv_run run[...];
    ...;
};
uint64_t tv_chunk_gather(struct tv_chunk *chunk, uintptr_t base, uint64_t *map, uint64_t from, uint64_t end,
                         uint64_t delta, int find_zeros);
int tv_chunk_write(struct tv_chunk *chunk, int fd, uintptr_t base);
const char *tv_chunk_parse(struct tv_chunk *chunk, const uint8_t *table, uint32_t size,
                           const struct tv_region *regions, uint32_t count);
int tv_chunk_read(struct tv_chunk *chunk, int fd, uint8_t *buffer);
uint32_t tv_chunk_verify(struct tv_chunk *chunk, const uint8_t *buffer, uint64_t *suspects);
int tv_chunk_store(struct tv_chunk *chunk, const uint8_t *buffer, int fd, uintptr_t base, uint64_t *received);
