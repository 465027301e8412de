/*
 * chatter: numbered lines of 64 bytes on the serial port, without end, as fast as it takes them.
 *
 * It works as an ordinary driver without interrupts does: wait for LSR.THRE, then fill the FIFO of 16 bytes. A line is
 * "chatter 0000000001 " and filling. No option.
 */
#include "guest.h"

#define LINE 64u
#define FIRST_DIGIT 8u
#define DIGITS 10u

static char line[LINE + 1] = "chatter 0000000000 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ\r\n";

static void count_up(void)
{
    char *digit = line + FIRST_DIGIT + DIGITS - 1;
    while (digit >= line + FIRST_DIGIT && ++*digit > '9')
        *digit-- = '0';
}

void guest_main(const struct start_info *info)
{
    serial_start();
    parse_options("chatter", command_line(info), 0, 0);
    for (;;) {
        count_up();
        serial_print(line);
    }
}
