/*
 * Memory load for a Linux guest: dirties pages at a set rate, and finds each as it left it. Linked statically.
 *
 *     load MIB PAGES
 *
 * keeps MIB of memory and rewrites PAGES pages of it a second, in a row and round and round, checking each before. On
 * SIGTERM it says how many pages it has checked, how often it has been through, and how many were not as they should be.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096
#define STAMPS 8
#define STRIDE (PAGE / STAMPS / sizeof(uint64_t))
#define BATCHES 50 /* a second */

static volatile sig_atomic_t ended;

static void end(int signal) { ended = signal; }

/* What stamp `index` of page `page` is after pass `pass`. */
static uint64_t stamp(uint64_t pass, uint64_t page, uint64_t index)
{
    return (pass + 1) * 0x9e3779b97f4a7c15u ^ (page * STAMPS + index) * 0xc2b2ae3d27d4eb4fu;
}

int main(int count, char **words)
{
    uint64_t pages, rate, page = 0, pass = 0, checked = 0, bad = 0;
    struct timespec next;
    uint64_t *memory;
    if (count != 3 || !(pages = strtoull(words[1], 0, 10) << 8) || !(rate = strtoull(words[2], 0, 10)))
        return fprintf(stderr, "usage: load MIB PAGES\n"), 2;
    memory = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return perror("load"), 1;
    signal(SIGTERM, end);
    clock_gettime(CLOCK_MONOTONIC, &next);
    while (!ended) {
        for (uint64_t n = 0; n < (rate + BATCHES - 1) / BATCHES; n++) {
            uint64_t *at = memory + page * (PAGE / sizeof *memory), wrong = 0;
            for (uint64_t index = 0; index < STAMPS; index++) {
                wrong |= at[index * STRIDE] ^ (pass ? stamp(pass - 1, page, index) : 0);
                at[index * STRIDE] = stamp(pass, page, index);
            }
            bad += wrong != 0;
            checked++;
            if (++page == pages)
                page = 0, pass++;
        }
        next.tv_nsec += 1000000000 / BATCHES;
        if (next.tv_nsec >= 1000000000)
            next.tv_nsec -= 1000000000, next.tv_sec++;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, 0);
    }
    printf("load: %llu pages, %llu passes, %llu bad\n", (unsigned long long)checked, (unsigned long long)pass,
           (unsigned long long)bad);
    return 0;
}
