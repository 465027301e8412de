/*
 * What the built-in guests keep in their RAM for the host to read. vmm/guests/heartbeat.py is the other half: it reads
 * this layout, and a test compares the two by compiling this file.
 *
 * Everything is little endian. The header lies at one fixed guest-physical address; `magic` is stored last, so a reader
 * that finds it finds the rest initialised. Counters only grow. 64-bit counters are stored high word first: a reader
 * that meets one in the middle of a store sees at worst a value that is too small, once in 2^32 steps.
 */
#ifndef TRIO_VMM_GUESTS_LAYOUT_H
#define TRIO_VMM_GUESTS_LAYOUT_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define HEADER_ADDRESS 0x00200000u
#define HEADER_MAGIC 0x54414542u /* "BEAT" */
#define HEADER_VERSION 1u

#define GUEST_HEARTBEAT 1u
#define GUEST_DEADLINE 2u
#define GUEST_DIRTIER 3u

#define TSC_FROM_HYPERVISOR 1u /* CPUID 0x40000010 */
#define TSC_FROM_CPUID 2u      /* CPUID 0x15 */
#define TSC_FROM_PIT 3u        /* measured against the PIT at start: good to about 0.1 % */

/* The ring: entry `n % RING_ENTRIES` belongs to tick n, counted from 0. */
#define RING_ADDRESS 0x00300000u
#define RING_ENTRIES 65536u
#define RING_CHECK 0x4b434954u /* "TICK" */

struct ring_entry {
    u32 sequence; /* low half of the tick's number */
    u32 check;    /* sequence ^ tsc low ^ tsc high ^ RING_CHECK: tells a torn entry */
    u64 tsc;      /* time of the interrupt handler */
};

/*
 * The checked region: page p of generation g carries STAMPS stamps, one every STAMP_STRIDE bytes. Pass g of the guest
 * finds g - 1 in every page and leaves g.
 */
#define REGION_ADDRESS 0x00400000u
#define PAGE_SIZE 4096u
#define STAMPS 8u
#define STAMP_STRIDE (PAGE_SIZE / STAMPS)
#define STAMP_CHECK 0x45474150u /* "PAGE" */

struct stamp {
    u32 generation;
    u32 tag; /* (page * STAMPS + index) ^ STAMP_CHECK */
};

#define BAD_LOST 1u     /* an older generation, or nothing: a write did not stay */
#define BAD_REPEATED 2u /* a newer generation, or another page: a write happened twice or in the wrong place */
#define BAD_TORN 3u     /* stamps that do not belong together */

struct header {
    u32 magic;
    u32 version;
    u32 guest;             /* GUEST_* */
    u32 rate_hz;           /* nominal ticks a second */
    u32 tsc_khz;
    u32 tsc_source;        /* TSC_FROM_* */
    u32 period_tsc;        /* one tick in TSC cycles, by tsc_khz */
    u32 ring_address;
    u32 ring_entries;
    u32 lines;             /* number of the last line put out */
    u64 head;              /* ticks so far; entries below it are complete */
    u64 largest_gap;       /* longest time between two ticks, in TSC cycles */
    u64 largest_gap_tick;  /* number of the tick that ended it */
    u64 missed;            /* gaps of more than 1.5 periods: a tick came late or not at all */
    u64 late;              /* gaps of more than 2 periods (2 ms at 1 kHz) */
    u32 region_address;
    u32 region_pages;
    u32 region_generation; /* generation of the pass under way */
    u32 region_cursor;     /* next page of this pass */
    u64 pages_checked;
    u32 lost;
    u32 repeated;
    u32 torn;
    u32 first_bad_kind;    /* BAD_*, 0 as long as all is well */
    u32 first_bad_address;
    u32 reserved;
};

/*
 * What `dirtier` keeps beside its header. Its region is one row of pages, in low RAM from DIRTIER_START or higher, and on
 * from 4 GiB. Page p that has been written g times begins and ends with a stamp of generation g; the index of the first
 * is 0, that of the last 1. `written` alone says how often every page has been written: they are written in order, again
 * and again, and it grows by one behind the last store to a page.
 */
#define DIRTIER_ADDRESS 0x00201000u
#define DIRTIER_MAGIC 0x54524944u /* "DIRT" */
#define DIRTIER_VERSION 1u
#define DIRTIER_START 0x00800000u
#define DIRTIER_LOW_END 0xc0000000u /* of low RAM what is above is not used: the window to high RAM is there */
#define DIRTIER_KEY 0x9e3779b1u     /* a stamp's check is (page * 2 + index) ^ generation * DIRTIER_KEY */

struct dirty_stamp {
    u32 generation;
    u32 check;
};

/*
 * A filled region: between its stamps (at first of generation 0) page p has the bytes at the same place of what starts
 * at word (p % FILL_PAGES * 1024 + p / FILL_PAGES) % FILL_WORDS of the filling, which goes on from its start at its end.
 * Word n of the filling is x(n + 1) of x(n + 1) = x(n) * FILL_FACTOR + FILL_SUMMAND, x(0) = 1.
 */
#define FILL_ADDRESS 0x00400000u
#define FILL_WORDS 0x40000u
#define FILL_PAGES (FILL_WORDS / 1024u)
#define FILL_FACTOR 1664525u
#define FILL_SUMMAND 1013904223u

struct dirtier {
    u32 magic;
    u32 version;
    u32 pages;          /* of the region */
    u32 low_pages;      /* of these below 3 GiB, from low_address; the others start at high_address */
    u64 low_address;
    u64 high_address;
    u32 pages_per_tick; /* the host may change it at any time */
    u32 filled;
    u64 written;        /* pages, since the start */
    u64 behind;         /* pages that a tick had no time for: the rate was not kept */
    u32 first_bad_page; /* once first_bad_kind of the header is set */
    u32 reserved;
};

#endif
