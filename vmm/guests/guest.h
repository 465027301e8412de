/*
 * What the built-in guests share: entry, ports, interrupts, TSC, serial port, command line.
 *
 * A guest is one freestanding 32-bit program, entered through the PVH ABI (protected mode, flat segments, no paging,
 * EBX -> hvm_start_info; source: Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h). It stays in ring 0 of
 * protected mode, without paging, SSE or x87.
 *
 * Some KVM hosts run such code in KVM's instruction emulator, at one or two million instructions a second, so the guests
 * keep their interrupt handlers short. That emulator has no IRET outside real mode (source: Linux,
 * arch/x86/kvm/emulate.c, em_iret), so handlers return by POPF, STI and RET, which is the same thing as long as the
 * privilege level does not change.
 */
#ifndef TRIO_VMM_GUESTS_GUEST_H
#define TRIO_VMM_GUESTS_GUEST_H

#include "layout.h"

#define HEADER ((volatile struct header *)HEADER_ADDRESS)
#define RING ((volatile struct ring_entry *)RING_ADDRESS)

/* --- entry ----------------------------------------------------------------------------------------------------- */

#define CODE_SELECTOR 8

struct start_info { /* Source: Xen, public/arch-x86/hvm/start_info.h, version 1 */
    u32 magic, version, flags, modules;
    u64 module_list, command_line, rsdp, memory_map;
    u32 memory_map_entries, reserved;
};

struct memory_map_entry {
    u64 address, size;
    u32 type, reserved;
};

#define MEMORY_RAM 1u

void guest_main(const struct start_info *info);

/* The note XEN_ELFNOTE_PHYS32_ENTRY (18) makes the image a PVH kernel. */
asm(".pushsection .note.pvh, \"a\", @note\n"
    "  .balign 4\n"
    "  .long 4, 4, 18\n"
    "  .asciz \"Xen\"\n"
    "  .long pvh_start\n"
    ".popsection\n"
    ".pushsection .text\n"
    ".globl pvh_start\n"
    "pvh_start:\n"
    "  cli\n"
    "  cld\n"
    "  movl $stack_end, %esp\n"
    "  lgdt gdt_pointer\n"
    "  ljmp $8, $1f\n"
    "1: movl $16, %eax\n"
    "  movl %eax, %ds\n"
    "  movl %eax, %es\n"
    "  movl %eax, %ss\n"
    "  pushl %ebx\n"
    "  call guest_main\n"
    "2: cli\n"
    "  hlt\n"
    "  jmp 2b\n"
    ".popsection\n"
    ".pushsection .data\n"
    "  .balign 8\n"
    "gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff\n"
    "gdt_pointer: .word 23\n"
    "  .long gdt\n"
    ".popsection\n"
    ".pushsection .bss\n"
    "  .balign 16\n"
    "  .skip 8192\n"
    "stack_end:\n"
    ".popsection\n");

/* --- ports, model specific registers, CPUID ------------------------------------------------------------------- */

static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static inline u8 in8(u16 port)
{
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u64 read_tsc(void)
{
    u64 value;
    asm volatile("rdtsc" : "=A"(value) : : "memory");
    return value;
}

static inline void write_msr(u32 index, u64 value) { asm volatile("wrmsr" : : "c"(index), "A"(value) : "memory"); }

static inline void cpuid(u32 leaf, u32 *eax, u32 *ebx, u32 *ecx, u32 *edx)
{
    asm volatile("cpuid" : "=a"(*eax), "=b"(*ebx), "=c"(*ecx), "=d"(*edx) : "a"(leaf), "c"(0));
}

/* 64 by 32 bits; the caller knows that the quotient fits into 32. (There is no libgcc to divide 64 bits.) */
static inline u32 divide(u64 dividend, u32 divisor)
{
    u32 quotient, rest;
    asm("divl %4" : "=a"(quotient), "=d"(rest) : "a"((u32)dividend), "d"((u32)(dividend >> 32)), "rm"(divisor) : "cc");
    return quotient;
}

/* Stores a counter that the host reads: high word first, see layout.h. */
static inline void store_counter(volatile u64 *counter, u64 value)
{
    volatile u32 *half = (volatile u32 *)counter;
    half[1] = (u32)(value >> 32);
    half[0] = (u32)value;
}

/* --- leaving --------------------------------------------------------------------------------------------------- */

#define DEBUG_EXIT_PORT 0x501 /* the VMM ends with status value * 2 + 1 */
#define EXIT_BAD_OPTION 1
#define EXIT_NO_FEATURE 2
#define EXIT_EXCEPTION 3

static void __attribute__((noreturn)) leave(u8 value)
{
    out8(DEBUG_EXIT_PORT, value);
    for (;;)
        asm volatile("cli; hlt");
}

/* --- serial port ----------------------------------------------------------------------------------------------- */

#define COM1 0x3f8
#define LSR_THRE 0x20
#define UART_FIFO 16u /* bytes that the transmitter takes once THRE is set (16550A) */

static void serial_start(void)
{
    out8(COM1 + 1, 0x00); /* no interrupts */
    out8(COM1 + 3, 0x80); /* DLAB: divisor 1, 115200 baud */
    out8(COM1 + 0, 0x01);
    out8(COM1 + 1, 0x00);
    out8(COM1 + 3, 0x03); /* 8N1 */
    out8(COM1 + 2, 0x07); /* FIFOs on, cleared */
    out8(COM1 + 4, 0x03); /* DTR, RTS */
}

static inline int serial_ready(void) { return in8(COM1 + 5) & LSR_THRE; }

/* Puts out what the transmitter takes at once and returns what is left; never waits. */
static const char *serial_push(const char *text)
{
    if (*text && serial_ready())
        for (u32 n = 0; n < UART_FIFO && *text; n++)
            out8(COM1, *text++);
    return text;
}

/* Waits for the transmitter. For what is said once; the main loops use serial_push. */
static void serial_print(const char *text)
{
    while (*text)
        text = serial_push(text);
}

static char *append(char *to, const char *text)
{
    while (*text)
        *to++ = *text++;
    *to = 0;
    return to;
}

static char *append_number(char *to, u32 value, u32 base)
{
    char digits[11];
    u32 n = 0;
    do {
        u32 digit = value % base;
        digits[n++] = digit < 10 ? '0' + digit : 'a' + digit - 10;
        value /= base;
    } while (value);
    while (n)
        *to++ = digits[--n];
    *to = 0;
    return to;
}

/* --- interrupts ------------------------------------------------------------------------------------------------ */

struct gate {
    u16 low, selector, flags, high;
};

static struct gate idt[256] __attribute__((aligned(8)));

static void set_gate(u8 vector, void (*handler)(void))
{
    u32 address = (u32)handler;
    idt[vector] = (struct gate){(u16)address, CODE_SELECTOR, 0x8e00, (u16)(address >> 16)};
}

/* Defines `name`, an interrupt entry that calls the C function `body`. Interrupts are off in it. */
#define INTERRUPT_ENTRY(name, body)                                                                                    \
    void name(void);                                                                                                   \
    asm(".pushsection .text\n" #name ":\n"                                                                             \
        "  pushal\n"                                                                                                   \
        "  cld\n"                                                                                                      \
        "  call " #body "\n"                                                                                           \
        "  popal\n" INTERRUPT_RETURN ".popsection\n")

/* The stack holds EIP, CS, EFLAGS. STI delays interrupts until RET has run, so handlers do not nest. */
#define INTERRUPT_RETURN                                                                                               \
    "  pushl 8(%esp)\n"                                                                                                \
    "  andl $~0x200, (%esp)\n"                                                                                         \
    "  popfl\n"                                                                                                        \
    "  sti\n"                                                                                                          \
    "  ret $8\n"

void spurious_entry(void);
asm(".pushsection .text\nspurious_entry:\n" INTERRUPT_RETURN ".popsection\n");

void __attribute__((used, noreturn)) on_exception(void)
{
    serial_print("\r\nguest: unexpected processor exception, giving up\r\n");
    leave(EXIT_EXCEPTION);
}

#define SPURIOUS_PIC_VECTOR 0x27
#define SPURIOUS_APIC_VECTOR 0xff

static void interrupts_start(void)
{
    struct __attribute__((packed)) {
        u16 limit;
        u32 base;
    } pointer = {sizeof idt - 1, (u32)idt};
    for (u32 vector = 0; vector < 32; vector++)
        set_gate(vector, (void (*)(void))on_exception);
    set_gate(SPURIOUS_PIC_VECTOR, spurious_entry);
    set_gate(SPURIOUS_APIC_VECTOR, spurious_entry);
    asm volatile("lidt %0" : : "m"(pointer));
}

#define PIC_MASTER 0x20
#define PIC_SLAVE 0xa0
#define PIC_EOI 0x20

/* Source: Intel SDM volume 3, 11.4 (registers), 11.5.1 (LVT), 11.9 (spurious vector) */
#define LAPIC(offset) (*(volatile u32 *)(0xfee00000u + (offset)))
#define LAPIC_SPURIOUS 0x0f0
#define LAPIC_LVT_LINT0 0x350
#define LAPIC_ENABLE 0x100
#define LAPIC_EXTINT 0x700

/*
 * Moves IRQ 0..15 to vectors 0x20..0x2f and lets through those of IRQ 0..7 whose bit in `mask` is 0. That the processor
 * listens to the PIC is firmware's work, which not every machine has (QEMU's microvm).
 */
static void pic_start(u8 mask)
{
    LAPIC(LAPIC_SPURIOUS) = LAPIC_ENABLE | SPURIOUS_APIC_VECTOR;
    LAPIC(LAPIC_LVT_LINT0) = LAPIC_EXTINT;
    out8(PIC_MASTER, 0x11);
    out8(PIC_SLAVE, 0x11);
    out8(PIC_MASTER + 1, 0x20);
    out8(PIC_SLAVE + 1, 0x28);
    out8(PIC_MASTER + 1, 4);
    out8(PIC_SLAVE + 1, 2);
    out8(PIC_MASTER + 1, 1);
    out8(PIC_SLAVE + 1, 1);
    out8(PIC_MASTER + 1, mask);
    out8(PIC_SLAVE + 1, 0xff);
}

/* --- timers ---------------------------------------------------------------------------------------------------- */

#define PIT_HZ 1193182u
#define PIT_CHANNEL0 0x40
#define PIT_COMMAND 0x43

static void pit_program(u8 command, u16 count)
{
    out8(PIT_COMMAND, command);
    out8(PIT_CHANNEL0, count & 0xff);
    out8(PIT_CHANNEL0, count >> 8);
}

static u16 pit_count(void)
{
    u8 low;
    out8(PIT_COMMAND, 0x00); /* latch channel 0 */
    low = in8(PIT_CHANNEL0);
    return low | in8(PIT_CHANNEL0) << 8;
}

/* Counts TSC cycles over about 10 ms of the PIT. A host that holds the guest up in between spoils one measurement. */
static u32 tsc_khz_by_pit(void)
{
    u64 start, end;
    u16 first, last;
    pit_program(0x30, 0xffff); /* mode 0: counts down once, and goes on from 0xffff */
    first = pit_count();
    start = read_tsc();
    do
        last = pit_count();
    while ((u16)(first - last) < PIT_HZ / 100);
    end = read_tsc();
    return divide((end - start) * (PIT_HZ / 1000), (u16)(first - last));
}

static u32 find_tsc_khz(u32 *source)
{
    u32 a, b, c, d, best[3];
    cpuid(0x40000000, &a, &b, &c, &d);
    if (a >= 0x40000010 && a < 0x40010000) {
        cpuid(0x40000010, &a, &b, &c, &d);
        *source = TSC_FROM_HYPERVISOR;
        if (a)
            return a;
    }
    cpuid(0, &a, &b, &c, &d);
    if (a >= 0x15) {
        cpuid(0x15, &a, &b, &c, &d);
        *source = TSC_FROM_CPUID;
        if (a && b && c)
            return divide((u64)(c / 1000) * b, a);
    }
    *source = TSC_FROM_PIT;
    for (u32 i = 0; i < 3; i++)
        best[i] = tsc_khz_by_pit();
    /* the middle one of three */
    if ((best[0] < best[1]) == (best[1] < best[2]))
        return best[1];
    return (best[1] < best[0]) == (best[0] < best[2]) ? best[0] : best[2];
}

/* --- ticks ----------------------------------------------------------------------------------------------------- */

struct tick_state {
    u64 count;
    volatile u32 seen; /* low half of count, for the main loop: it changes in one store */
    u64 last;       /* TSC of the last tick */
    u64 largest;
    u32 missed_gap; /* 1.5 periods */
    u32 late_gap;   /* 2 periods */
};

static struct tick_state ticks;

static void header_start(u32 guest, u32 rate_hz, u32 tsc_khz, u32 tsc_source, u32 period_tsc)
{
    volatile u32 *word = (volatile u32 *)HEADER;
    for (u32 n = 0; n < sizeof(struct header) / 4; n++)
        word[n] = 0;
    HEADER->version = HEADER_VERSION;
    HEADER->guest = guest;
    HEADER->rate_hz = rate_hz;
    HEADER->tsc_khz = tsc_khz;
    HEADER->tsc_source = tsc_source;
    HEADER->period_tsc = period_tsc;
    HEADER->ring_address = RING_ADDRESS;
    HEADER->ring_entries = RING_ENTRIES;
    ticks.missed_gap = period_tsc + period_tsc / 2;
    ticks.late_gap = period_tsc * 2;
}

/* Records one tick; called with interrupts off. */
static inline void record_tick(u64 now)
{
    u32 sequence = (u32)ticks.count;
    volatile struct ring_entry *entry = &RING[sequence % RING_ENTRIES];
    entry->tsc = now;
    entry->sequence = sequence;
    entry->check = sequence ^ (u32)now ^ (u32)(now >> 32) ^ RING_CHECK;
    if (ticks.count) {
        u64 gap = now - ticks.last;
        if (gap > ticks.missed_gap) {
            HEADER->missed++;
            if (gap > ticks.late_gap)
                HEADER->late++;
        }
        if (gap > ticks.largest) {
            ticks.largest = gap;
            store_counter(&HEADER->largest_gap, gap);
            store_counter(&HEADER->largest_gap_tick, ticks.count);
        }
    }
    ticks.last = now;
    ticks.count++;
    ticks.seen = (u32)ticks.count;
    store_counter(&HEADER->head, ticks.count);
}

/* --- command line ---------------------------------------------------------------------------------------------- */

static void __attribute__((noreturn)) refuse(const char *name, const char *word, const char *reason)
{
    char text[200], *to = append(text, name);
    to = append(to, ": ");
    for (u32 n = 0; n < 80 && *word && *word != ' '; n++)
        *to++ = *word++;
    to = append(to, reason);
    append(to, "\r\n");
    serial_print(text);
    leave(EXIT_BAD_OPTION);
}

/* Reads a number with an optional suffix K, M or G at `text`; `*end` is where it stopped. 0 if there is none. */
static u64 parse_size(const char *text, const char **end)
{
    u64 value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + (*text++ - '0');
    if (*text == 'K' || *text == 'k')
        value <<= 10, text++;
    else if (*text == 'M' || *text == 'm')
        value <<= 20, text++;
    else if (*text == 'G' || *text == 'g')
        value <<= 30, text++;
    *end = text;
    return value;
}

struct option {
    const char *name; /* with the equals sign */
    u32 *value;
    u32 lowest, highest;
    u32 shift; /* the value is in units of 1 << shift; what is over is left out */
};

/* Reads words of the form name=size; anything else ends the guest with a sentence on the serial port. */
static void parse_options(const char *guest, const char *text, const struct option *options, u32 count)
{
    while (*text) {
        u64 value;
        u32 n, i = 0;
        const char *word = text, *end = text;
        if (*text == ' ') {
            text++;
            continue;
        }
        for (n = 0; n < count; n++) {
            for (i = 0; options[n].name[i] && options[n].name[i] == word[i]; i++)
                ;
            if (!options[n].name[i])
                break;
        }
        if (n == count)
            refuse(guest, word, " is not an option of this guest");
        value = parse_size(word + i, &end) >> options[n].shift;
        if (end == word + i || (*end && *end != ' '))
            refuse(guest, word, " is not a size: give a number, with K, M or G behind it if you like");
        if (value < options[n].lowest || value > options[n].highest)
            refuse(guest, word, " is out of range");
        *options[n].value = (u32)value;
        text = end;
    }
}

static inline const char *command_line(const struct start_info *info)
{
    return info->command_line ? (const char *)(u32)info->command_line : "";
}

#endif
