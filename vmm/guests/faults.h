/* Counting what a guest found wrong in its memory, and telling how it is, in a line ten times a second. */
#ifndef TRIO_VMM_GUESTS_FAULTS_H
#define TRIO_VMM_GUESTS_FAULTS_H

#include "guest.h"

static void count_fault(u32 kind, u32 address)
{
    if (kind == BAD_LOST)
        HEADER->lost++;
    else if (kind == BAD_REPEATED)
        HEADER->repeated++;
    else
        HEADER->torn++;
    if (!HEADER->first_bad_kind) {
        HEADER->first_bad_address = address;
        HEADER->first_bad_kind = kind;
    }
}

/* Writes the next numbered line to `line`, which has room for 120 bytes; `name` ends in a space. */
static const char *next_line(char *line, const char *name)
{
    u32 number = HEADER->lines + 1;
    char *to = append(line, name);
    to = append_number(to, number, 10);
    if (!HEADER->first_bad_kind)
        to = append(to, " ok");
    else {
        to = append(to, " FAULT lost=");
        to = append_number(to, HEADER->lost, 10);
        to = append(to, " repeated=");
        to = append_number(to, HEADER->repeated, 10);
        to = append(to, " torn=");
        to = append_number(to, HEADER->torn, 10);
        to = append(to, " first=0x");
        to = append_number(to, HEADER->first_bad_address, 16);
    }
    append(to, "\r\n");
    HEADER->lines = number;
    return line;
}

struct telling {
    const char *name;   /* ends in a space */
    const char *output; /* what has not gone out yet */
    u32 every, due;     /* in ticks */
    char line[120];
};

static void telling_start(struct telling *telling, const char *name, const char *first, u32 rate_hz)
{
    telling->name = name;
    telling->output = first;
    telling->due = telling->every = rate_hz / 10;
}

/* Puts out what is due in tick `now`; never waits. */
static inline void tell(struct telling *telling, u32 now)
{
    if (*telling->output)
        telling->output = serial_push(telling->output);
    else if ((int)(now - telling->due) >= 0) {
        telling->due += telling->every;
        telling->output = serial_push(next_line(telling->line, telling->name));
    }
}

#endif
