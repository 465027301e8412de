/* Ticks of the PIT, recorded: what the guests that live by them share. */
#ifndef TRIO_VMM_GUESTS_PIT_TICKS_H
#define TRIO_VMM_GUESTS_PIT_TICKS_H

#include "faults.h"

#define TIMER_VECTOR 0x20

/*
 * The handler's EOI comes last, before interrupts are on again. KVM counts an EOI as the acknowledgement that lets the
 * PIT inject the next of the ticks it owes, so after a pause the owed ticks follow one by one and none is lost.
 */
void __attribute__((used)) on_tick(void)
{
    record_tick(read_tsc());
    out8(PIC_MASTER, PIC_EOI);
}

INTERRUPT_ENTRY(timer_entry, on_tick);

/* Begins the header. The guest adds what is its own, and the magic last. */
static void pit_ticks_header(u32 guest, u32 rate_hz)
{
    u32 source, khz;
    pic_start(0xfe);
    khz = find_tsc_khz(&source);
    header_start(guest, rate_hz, khz, source, divide((u64)(PIT_HZ / rate_hz) * khz, PIT_HZ / 1000));
}

/* Lets the ticks come. */
static void pit_ticks_start(u32 rate_hz)
{
    set_gate(TIMER_VECTOR, timer_entry);
    pit_program(0x34, PIT_HZ / rate_hz); /* mode 2: one tick each so many counts */
    asm volatile("sti");
}

#endif
