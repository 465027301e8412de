/*
 * dirtier: writes pages at a set rate, and finds out whether they stay as it wrote them.
 *
 * Command line: region=SIZE (memory to write, default 4M), start=ADDRESS (of the region, default 8M, and not below; at
 * 3 GiB it goes on from 4 GiB), pages=N (pages to write in each tick, default 8), hz=N (ticks a second, 20 to 2000,
 * default 100), fill=1 (first fill the region with bytes of which no page is like another), filled=1 (the host has done
 * that: vmm/guests/dirtier.py, `Filling`).
 *
 * Pages are written in order, round and round. Before a page is written again it must be as the last round left it. A
 * reader on the host (vmm/guests/dirtier.py, layout in layout.h) can verify the whole region from one counter, at any
 * time. Ticks are recorded as heartbeat does. On the serial port: lines as heartbeat's, ten a second.
 */
#include "pit_ticks.h"

#define DIRTIER ((volatile struct dirtier *)DIRTIER_ADDRESS)
#define FIRST_PAGE (DIRTIER_START / PAGE_SIZE)
#define MOST_PAGES (1u << 28)
#define LAST_STAMP (PAGE_SIZE / sizeof(struct dirty_stamp) - 1)

static u32 rate_hz = 100, pages_per_tick = 8, fill, filled;
static u32 region_pages = 1024, start_page = FIRST_PAGE, low_pages;
static u32 low_address;
static u64 high_address;

static const struct option OPTIONS[] = {
    {"region=", &region_pages, 1, MOST_PAGES, 12},
    {"start=", &start_page, FIRST_PAGE, MOST_PAGES, 12},
    {"pages=", &pages_per_tick, 0, 1u << 20, 0},
    {"hz=", &rate_hz, 20, 2000, 0},
    {"fill=", &fill, 0, 1, 0},
    {"filled=", &filled, 0, 1, 0},
};

/* --- where the pages are --------------------------------------------------------------------------------------- */

/*
 * RAM above 4 GiB is seen through a window of 2 MiB, which needs paging: PAE, pages of 2 MiB, everything else at its
 * own address. Without high RAM in the region paging stays off.
 */
#define LARGE_PAGE_SHIFT 21
#define LARGE_PAGE_MASK ((1u << LARGE_PAGE_SHIFT) - 1)
#define WINDOW DIRTIER_LOW_END
#define ENTRY_PRESENT 0x01u
#define ENTRY_WRITABLE 0x02u
#define ENTRY_LARGE 0x80u
#define CR0_PG (1u << 31)
#define CR4_PAE (1u << 5)

static volatile u64 directories[4][512] __attribute__((aligned(4096)));
static volatile u64 directory_pointers[4] __attribute__((aligned(32)));
static u32 window_block; /* number of the large page that the window shows */

static void set_entry(volatile u64 *entry, u32 block)
{
    volatile u32 *half = (volatile u32 *)entry;
    half[0] = 0;
    half[1] = block >> (32 - LARGE_PAGE_SHIFT);
    half[0] = block << LARGE_PAGE_SHIFT | ENTRY_LARGE | ENTRY_WRITABLE | ENTRY_PRESENT;
}

static void paging_start(void)
{
    u32 value;
    for (u32 block = 0; block < 2048; block++)
        set_entry(&directories[block / 512][block % 512], block);
    for (u32 n = 0; n < 4; n++)
        directory_pointers[n] = (u32)directories[n] | ENTRY_PRESENT;
    asm volatile("movl %%cr4, %0" : "=r"(value));
    asm volatile("movl %0, %%cr4" : : "r"(value | CR4_PAE) : "memory");
    asm volatile("movl %0, %%cr3" : : "r"(directory_pointers) : "memory");
    asm volatile("movl %%cr0, %0" : "=r"(value));
    asm volatile("movl %0, %%cr0" : : "r"(value | CR0_PG) : "memory");
    window_block = WINDOW >> LARGE_PAGE_SHIFT;
}

/* First stamp of a page of the region; valid until the next call. */
static volatile struct dirty_stamp *page_at(u32 page)
{
    u64 address;
    u32 block;
    if (page < low_pages)
        return (volatile struct dirty_stamp *)(low_address + page * PAGE_SIZE);
    address = high_address + (u64)(page - low_pages) * PAGE_SIZE;
    block = (u32)(address >> LARGE_PAGE_SHIFT);
    if (block != window_block) {
        window_block = block;
        set_entry(&directories[WINDOW >> 30][WINDOW >> LARGE_PAGE_SHIFT & 511], block);
        asm volatile("invlpg (%0)" : : "r"(WINDOW) : "memory");
    }
    return (volatile struct dirty_stamp *)(WINDOW + ((u32)address & LARGE_PAGE_MASK));
}

/* Finds the RAM for the region, or ends the guest with a sentence. */
static void lay_region_out(const struct start_info *info)
{
    const struct memory_map_entry *entry = (const struct memory_map_entry *)(u32)info->memory_map;
    char text[120], *to;
    u32 high_pages = 0;
    for (u32 n = 0; info->version >= 1 && n < info->memory_map_entries; n++, entry++) {
        u64 address = entry->address, end = address + entry->size, start = (u64)start_page << 12;
        if (entry->type != MEMORY_RAM || end <= start)
            continue;
        if (address < start)
            address = start;
        if (address >> 32) {
            if (!high_pages) {
                high_address = address;
                high_pages = (u32)((end - address) >> 12);
            }
        } else if (address == start && address < DIRTIER_LOW_END) {
            low_address = (u32)address;
            low_pages = ((end < DIRTIER_LOW_END ? (u32)end : DIRTIER_LOW_END) - low_address) / PAGE_SIZE;
        }
    }
    if (region_pages <= low_pages) {
        low_pages = region_pages;
        return;
    }
    if (region_pages <= low_pages + high_pages) {
        paging_start();
        return;
    }
    to = append(text, "dirtier: a region of ");
    to = append_number(to, region_pages << 2, 10);
    to = append(to, " KiB does not fit: there are ");
    to = append_number(to, (low_pages + high_pages) << 2, 10);
    append(to, " KiB of RAM for it\r\n");
    serial_print(text);
    leave(EXIT_BAD_OPTION);
}

/* The low half of a page's address, for the header. */
static u32 address_of(u32 page)
{
    if (page < low_pages)
        return low_address + page * PAGE_SIZE;
    return (u32)high_address + (page - low_pages) * PAGE_SIZE;
}

/* --- writing ----------------------------------------------------------------------------------------------------- */

static u32 cursor, generation = 1; /* the page to be written next, and what it gets */
static u32 key_before, key = DIRTIER_KEY;
static u64 written;

/* Says how a page that should have generation `expected` is wrong. */
static u32 classify(volatile struct dirty_stamp *first, u32 page, u32 expected)
{
    volatile struct dirty_stamp *last = first + LAST_STAMP;
    u32 found = first->generation, place = first->check ^ found * DIRTIER_KEY;
    if (!first->generation && !first->check && !last->generation && !last->check)
        return BAD_LOST;
    if (last->generation != found || (last->check ^ found * DIRTIER_KEY) != place + 1 || place & 1)
        return BAD_TORN;
    if (place / 2 != page)
        return BAD_REPEATED;
    return found < expected ? BAD_LOST : BAD_REPEATED;
}

static void set_stamps(volatile struct dirty_stamp *first, u32 page)
{
    first->generation = generation;
    first->check = (page * 2) ^ key;
    first[LAST_STAMP].generation = generation;
    first[LAST_STAMP].check = (page * 2 + 1) ^ key;
}

static void step_page(void)
{
    volatile struct dirty_stamp *first = page_at(cursor);
    u32 place = (cursor * 2) ^ key_before, before = generation - 1;
    u32 bad = (first->generation ^ before) | (first->check ^ place) | (first[LAST_STAMP].generation ^ before) |
              (first[LAST_STAMP].check ^ place ^ 1);
    if (bad && (before || filled)) { /* before the first round the region holds anything */
        if (!HEADER->first_bad_kind)
            DIRTIER->first_bad_page = cursor;
        count_fault(classify(first, cursor, before), address_of(cursor));
    }
    set_stamps(first, cursor);
    if (++cursor == region_pages) {
        cursor = 0;
        generation++;
        key_before = key;
        key += DIRTIER_KEY;
    }
    store_counter(&DIRTIER->written, ++written);
}

static void work(u64 until)
{
    u32 left = DIRTIER->pages_per_tick;
    for (; left && read_tsc() < until; left--)
        step_page();
    if (left)
        store_counter(&DIRTIER->behind, DIRTIER->behind + left);
    store_counter(&HEADER->pages_checked, written);
}

/* --- filling ----------------------------------------------------------------------------------------------------- */

static void copy_words(volatile void *to, const u32 *from, u32 count)
{
    asm volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

static void fill_region(void)
{
    u32 *filling = (u32 *)FILL_ADDRESS, x = 1;
    for (u32 n = 0; n < FILL_WORDS; n++)
        filling[n] = x = x * FILL_FACTOR + FILL_SUMMAND;
    copy_words(filling + FILL_WORDS, filling, 1024);
    generation = key = 0;
    for (u32 page = 0; page < region_pages; page++) {
        volatile struct dirty_stamp *first = page_at(page);
        copy_words(first, filling + (page % FILL_PAGES * 1024 + page / FILL_PAGES) % FILL_WORDS, 1024);
        set_stamps(first, page);
    }
    generation = 1;
    key = DIRTIER_KEY;
}

void guest_main(const struct start_info *info)
{
    struct telling telling;
    u32 seen = 0;

    serial_start();
    parse_options("dirtier", command_line(info), OPTIONS, sizeof OPTIONS / sizeof *OPTIONS);
    interrupts_start();
    lay_region_out(info);
    if (fill) {
        serial_print("dirtier: filling\r\n");
        fill_region();
        filled = 1;
    }
    pit_ticks_header(GUEST_DIRTIER, rate_hz);
    HEADER->region_address = address_of(0);
    HEADER->region_pages = region_pages;
    DIRTIER->version = DIRTIER_VERSION;
    DIRTIER->pages = region_pages;
    DIRTIER->low_pages = low_pages;
    DIRTIER->low_address = low_address;
    DIRTIER->high_address = high_address;
    DIRTIER->pages_per_tick = pages_per_tick;
    DIRTIER->filled = filled;
    DIRTIER->written = DIRTIER->behind = 0;
    DIRTIER->first_bad_page = 0;
    DIRTIER->magic = DIRTIER_MAGIC;
    HEADER->magic = HEADER_MAGIC;

    telling_start(&telling, "dirtier ", "dirtier: started\r\n", rate_hz);
    pit_ticks_start(rate_hz);
    for (;;) {
        u32 now = ticks.seen;
        if (now != seen) {
            seen = now;
            tell(&telling, now);
            work(read_tsc() + HEADER->period_tsc / 4 * 3);
        }
        asm volatile("cli");
        if (ticks.seen == seen)
            asm volatile("sti; hlt"); /* no interrupt between the two */
        else
            asm volatile("sti");
    }
}
