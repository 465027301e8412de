/*
 * heartbeat: ticks on the PIT, prints a numbered line ten times a second, and keeps dirtying and checking memory.
 *
 * Command line: hz=N (ticks a second, 20 to 2000, default 1000), region=SIZE (memory to dirty and check, default 4M),
 * pages=N (pages to check and rewrite in each tick, default 8; the guest stops earlier when half of a tick is used up).
 *
 * What it says is for a reader on the host (vmm/guests/heartbeat.py, layout in layout.h): every tick with its TSC, the
 * largest gap, and every page that was lost, repeated or torn. On the serial port: "heartbeat 123 ok", with no number
 * missing, or "heartbeat 123 FAULT lost=1 repeated=0 torn=0 first=0x400000".
 */
#include "pit_ticks.h"

static u32 rate_hz = 1000, region_size = 4 << 20, pages_per_tick = 8;

static const struct option OPTIONS[] = {
    {"hz=", &rate_hz, 20, 2000, 0},
    {"region=", &region_size, PAGE_SIZE, 0xf0000000u, 0},
    {"pages=", &pages_per_tick, 0, 1u << 20, 0},
};

/* --- the region ------------------------------------------------------------------------------------------------ */

static volatile struct stamp *stamp_at(u32 page, u32 index)
{
    return (volatile struct stamp *)(REGION_ADDRESS + page * PAGE_SIZE + index * STAMP_STRIDE);
}

static inline u32 tag_of(u32 page, u32 index) { return (page * STAMPS + index) ^ STAMP_CHECK; }

/* Says how a page that is not as pass `expected` left it is wrong. */
static u32 classify(u32 page, u32 expected)
{
    u32 generation = stamp_at(page, 0)->generation, base = stamp_at(page, 0)->tag ^ STAMP_CHECK, zeros = 0;
    for (u32 i = 0; i < STAMPS; i++)
        zeros += !stamp_at(page, i)->generation && !stamp_at(page, i)->tag;
    if (zeros == STAMPS)
        return BAD_LOST;
    if (base % STAMPS)
        return BAD_TORN;
    for (u32 i = 0; i < STAMPS; i++)
        if (stamp_at(page, i)->generation != generation || (stamp_at(page, i)->tag ^ STAMP_CHECK) != base + i)
            return BAD_TORN;
    if (base / STAMPS != page)
        return BAD_REPEATED;
    return generation < expected ? BAD_LOST : BAD_REPEATED;
}

/* Checks that a page is as the last pass left it, and writes the next generation into it. */
static void step_page(u32 page, u32 generation)
{
    volatile struct stamp *stamp = stamp_at(page, 0);
    u32 tag = page * STAMPS, bad = 0;
    for (u32 i = 0; i < STAMPS; i++, stamp += STAMP_STRIDE / sizeof *stamp)
        bad |= (stamp->generation ^ (generation - 1)) | (stamp->tag ^ (tag + i) ^ STAMP_CHECK);
    if (bad && generation > 1) /* before the first pass the region holds anything */
        count_fault(classify(page, generation - 1), REGION_ADDRESS + page * PAGE_SIZE);
    stamp = stamp_at(page, 0);
    for (u32 i = 0; i < STAMPS; i++, stamp += STAMP_STRIDE / sizeof *stamp) {
        stamp->generation = generation;
        stamp->tag = (tag + i) ^ STAMP_CHECK;
    }
}

static void work(u64 until)
{
    u32 page = HEADER->region_cursor, generation = HEADER->region_generation;
    u64 checked = HEADER->pages_checked;
    for (u32 n = 0; n < pages_per_tick && read_tsc() < until; n++) {
        step_page(page, generation);
        checked++;
        if (++page == HEADER->region_pages) {
            page = 0;
            HEADER->region_generation = ++generation;
        }
        HEADER->region_cursor = page;
    }
    store_counter(&HEADER->pages_checked, checked);
}

/* Ends the guest with a sentence if the region does not lie in one piece of RAM. */
static void check_region_fits(const struct start_info *info)
{
    const struct memory_map_entry *entry = (const struct memory_map_entry *)(u32)info->memory_map;
    char text[120], *to;
    u32 room = 0;
    if (info->version < 1 || !info->memory_map_entries)
        return;
    for (u32 n = 0; n < info->memory_map_entries; n++, entry++)
        if (entry->type == MEMORY_RAM && entry->address <= REGION_ADDRESS &&
            entry->address + entry->size > REGION_ADDRESS) {
            u64 size = entry->address + entry->size - REGION_ADDRESS;
            room = size >> 32 ? 0xffffffffu : (u32)size;
        }
    if (region_size <= room)
        return;
    to = append(text, "heartbeat: a region of ");
    to = append_number(to, region_size >> 10, 10);
    to = append(to, " KiB does not fit: there are ");
    to = append_number(to, room >> 10, 10);
    append(to, " KiB of RAM above 4 MiB\r\n");
    serial_print(text);
    leave(EXIT_BAD_OPTION);
}

void guest_main(const struct start_info *info)
{
    struct telling telling;
    u32 seen = 0;

    serial_start();
    parse_options("heartbeat", command_line(info), OPTIONS, sizeof OPTIONS / sizeof *OPTIONS);
    check_region_fits(info);
    interrupts_start();
    pit_ticks_header(GUEST_HEARTBEAT, rate_hz);
    HEADER->region_address = REGION_ADDRESS;
    HEADER->region_pages = region_size / PAGE_SIZE;
    HEADER->region_generation = 1;
    HEADER->magic = HEADER_MAGIC;

    telling_start(&telling, "heartbeat ", "heartbeat: started\r\n", rate_hz);
    pit_ticks_start(rate_hz);
    for (;;) {
        u32 now = ticks.seen;
        if (now != seen) {
            seen = now;
            tell(&telling, now);
            work(read_tsc() + HEADER->period_tsc / 2);
        }
        asm volatile("hlt");
    }
}
