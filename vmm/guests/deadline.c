/*
 * deadline: ticks on the local APIC's TSC-deadline timer, each tick arming the next.
 *
 * Command line: hz=N (ticks a second, 10 to 1000, default 100).
 *
 * There is no watchdog: if one deadline is lost (by a live update that drops IA32_TSC_DEADLINE, say) the guest sleeps for
 * ever and its lines stop. Ticks are recorded as heartbeat does; a deadline that is missed by more than a period is not
 * made up for. On the serial port: "deadline 12 ok", ten lines a second.
 */
#include "faults.h"

#define TIMER_VECTOR 0x40

/* Source: Intel SDM volume 3, 11.4 (registers), 11.5.4.1 (TSC-deadline mode) */
#define LAPIC_EOI 0x0b0
#define LAPIC_LVT_TIMER 0x320
#define TIMER_DEADLINE (2u << 17)
#define MSR_TSC_DEADLINE 0x6e0
#define CPUID_1_ECX_DEADLINE (1u << 24)

static u32 rate_hz = 100, period;
static u64 next_deadline;

static const struct option OPTIONS[] = {{"hz=", &rate_hz, 10, 1000, 0}};

void __attribute__((used)) on_deadline(void)
{
    u64 now = read_tsc();
    record_tick(now);
    next_deadline += period;
    if (next_deadline <= now)
        next_deadline = now + period;
    write_msr(MSR_TSC_DEADLINE, next_deadline);
    LAPIC(LAPIC_EOI) = 0;
}

INTERRUPT_ENTRY(deadline_entry, on_deadline);

void guest_main(const struct start_info *info)
{
    struct telling telling;
    u32 a, b, c, d, khz, source, seen = 0;

    serial_start();
    parse_options("deadline", command_line(info), OPTIONS, sizeof OPTIONS / sizeof *OPTIONS);
    cpuid(1, &a, &b, &c, &d);
    if (!(c & CPUID_1_ECX_DEADLINE)) {
        serial_print("deadline: this processor has no TSC-deadline timer (CPUID 1, ECX bit 24)\r\n");
        leave(EXIT_NO_FEATURE);
    }
    interrupts_start();
    pic_start(0xff);
    khz = find_tsc_khz(&source);
    period = divide((u64)khz * 1000, rate_hz);
    header_start(GUEST_DEADLINE, rate_hz, khz, source, period);
    HEADER->magic = HEADER_MAGIC;

    telling_start(&telling, "deadline ", "deadline: started\r\n", rate_hz);
    set_gate(TIMER_VECTOR, deadline_entry);
    LAPIC(LAPIC_LVT_TIMER) = TIMER_DEADLINE | TIMER_VECTOR;
    asm volatile("mfence" : : : "memory"); /* the mode must be set before the MSR is written: SDM 11.5.4.1 */
    next_deadline = read_tsc() + period;
    write_msr(MSR_TSC_DEADLINE, next_deadline);
    asm volatile("sti");
    for (;;) {
        u32 now = ticks.seen;
        if (now != seen) {
            seen = now;
            tell(&telling, now);
        }
        asm volatile("hlt");
    }
}
