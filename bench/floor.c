/*
 * The floor of a live update: what the machine and its KVM need for it, with nothing of a VMM around it.
 *
 * Two processes share a guest's RAM (a memfd) and a socket. The source runs a real-mode guest that ticks on the PIT and
 * keeps the time since the tick before in a ring. Some ticks later it takes the vCPU out, reads all that KVM knows of
 * the VM, and writes it to the socket; the destination, whose own VM has been ready all the while, loads it and enters
 * the guest. There is no protocol, no check and no way back: no VMM can be faster on this machine.
 *
 * Usage: floor [TICKS]. Prints one line of JSON: the stages in milliseconds, and the gaps between ticks: the one with
 * the pause in it ("guest_pause"), the longest of the time before ("calm_longest"), the normal one ("normal_gap").
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* --- the guest ------------------------------------------------------------------------------------------------- */

#define RAM_SIZE (16u << 20)
#define CODE 0x1000u
#define COUNT 0x2000u /* ticks so far */
#define RING 0x4000u  /* TSC cycles since the tick before, one word a tick */
#define RING_ENTRIES 4096u
#define PIT_HZ 1193182.0
#define DIVISOR 1193 /* 1 kHz, as near as the PIT gets */

extern const char guest_begin[], guest_end[];

asm(".pushsection .rodata\n"
    ".code16\n"
    "guest_begin:\n"
    "  cli\n"
    "  xorw %ax, %ax\n"
    "  movw %ax, %ds\n"
    "  movw %ax, %ss\n"
    "  movw $0x1000, %sp\n"
    /* Interrupt 0x20 goes to the handler below, whose place in the guest is CODE and its distance from the begin. */
    "  movw $(0x1000 + on_tick - guest_begin), 0x80\n"
    "  movw %ax, 0x82\n"
    /* The master PIC: vectors from 0x20 on, all masked but the timer. */
    "  movb $0x11, %al\n  outb %al, $0x20\n"
    "  movb $0x20, %al\n  outb %al, $0x21\n"
    "  movb $0x04, %al\n  outb %al, $0x21\n"
    "  movb $0x01, %al\n  outb %al, $0x21\n"
    "  movb $0xfe, %al\n  outb %al, $0x21\n"
    /* PIT channel 0, mode 2. */
    "  movb $0x34, %al\n  outb %al, $0x43\n"
    "  movw $1193, %ax\n  outb %al, $0x40\n"
    "  movb %ah, %al\n    outb %al, $0x40\n"
    "  sti\n"
    "1: hlt\n"
    "  jmp 1b\n"
    "on_tick:\n"
    "  rdtsc\n"
    "  movl %eax, %ebx\n"
    "  subl 0x2008, %eax\n"
    "  movl %ebx, 0x2008\n"
    "  movl 0x2000, %esi\n"
    "  andl $4095, %esi\n"
    "  movl %eax, 0x4000(,%esi,4)\n"
    "  incl 0x2000\n"
    "  movb $0x20, %al\n"
    "  outb %al, $0x20\n" /* last: KVM injects the next tick that it owes only after this */
    "  iret\n"
    "guest_end:\n"
    ".code64\n"
    ".popsection\n");

/* --- a VM ------------------------------------------------------------------------------------------------------ */

#define MAX_MSRS 512
#define XSAVE_LIMIT 16384
#define MSR_TSC 0x10u

struct machine {
    int kvm, vm, vcpu;
    struct kvm_run *run;
    char *ram;
    size_t xsave_size;
};

struct state {
    struct kvm_mp_state mp;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    struct kvm_debugregs debugregs;
    struct kvm_vcpu_events events;
    struct kvm_lapic_state lapic;
    struct kvm_irqchip chips[3];
    struct kvm_pit_state2 pit;
    struct kvm_clock_data clock;
    unsigned long long tsc_offset;
    int has_tsc_offset;
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[MAX_MSRS];
    } msrs;
    char xsave[XSAVE_LIMIT];
};

static void fail(const char *what)
{
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int call(int fd, unsigned long request, void *argument, const char *name)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        fail(name);
    return result;
}

#define CALL(fd, request, argument) call(fd, request, (void *)(argument), #request)

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static struct machine make(int ram_fd)
{
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid;
    struct machine m;
    struct kvm_pit_config pit = {0};
    struct kvm_userspace_memory_region slot = {.memory_size = RAM_SIZE};
    int size;

    if ((m.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) < 0)
        fail("/dev/kvm");
    m.vm = CALL(m.kvm, KVM_CREATE_VM, 0);
    CALL(m.vm, KVM_SET_TSS_ADDR, 0xfffbd000ul);
    CALL(m.vm, KVM_CREATE_IRQCHIP, 0);
    CALL(m.vm, KVM_CREATE_PIT2, &pit);
    if ((m.ram = mmap(0, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0)) == MAP_FAILED)
        fail("mmap");
    slot.userspace_addr = (unsigned long)m.ram;
    CALL(m.vm, KVM_SET_USER_MEMORY_REGION, &slot);
    m.vcpu = CALL(m.vm, KVM_CREATE_VCPU, 0);
    cpuid.head.nent = 256;
    CALL(m.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    CALL(m.vcpu, KVM_SET_CPUID2, &cpuid);
    size = CALL(m.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if ((m.run = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0)) == MAP_FAILED)
        fail("mmap of the vCPU");
    size = ioctl(m.vm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    m.xsave_size = size > 4096 ? size : 4096;
    if (m.xsave_size > XSAVE_LIMIT) {
        fprintf(stderr, "floor: an XSAVE area of %zu bytes is more than expected\n", m.xsave_size);
        exit(1);
    }
    return m;
}

/* Lists the MSRs once, before the pause: those that KVM gives and takes, but the TSC, which goes by its offset. */
static void list_msrs(struct machine *m, struct state *s)
{
    static struct {
        struct kvm_msr_list head;
        __u32 indices[MAX_MSRS];
    } list;
    unsigned count = 0;
    list.head.nmsrs = MAX_MSRS;
    CALL(m->kvm, KVM_GET_MSR_INDEX_LIST, &list);
    for (unsigned i = 0; i < list.head.nmsrs; i++) {
        s->msrs.head.nmsrs = 1;
        s->msrs.entries[0].index = list.indices[i];
        if (list.indices[i] != MSR_TSC && ioctl(m->vcpu, KVM_GET_MSRS, &s->msrs) == 1 &&
            ioctl(m->vcpu, KVM_SET_MSRS, &s->msrs) == 1)
            list.indices[count++] = list.indices[i];
    }
    for (unsigned i = 0; i < count; i++)
        s->msrs.entries[i].index = list.indices[i];
    s->msrs.head.nmsrs = count;
}

static int tsc_offset(struct machine *m, unsigned long request, unsigned long long *offset)
{
    struct kvm_device_attr attr = {
        .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (unsigned long)offset};
    return ioctl(m->vcpu, request, &attr) == 0;
}

static void save(struct machine *m, struct state *s)
{
    CALL(m->vcpu, KVM_GET_MP_STATE, &s->mp);
    for (int i = 0; i < 3; i++) {
        s->chips[i].chip_id = i;
        CALL(m->vm, KVM_GET_IRQCHIP, &s->chips[i]);
    }
    CALL(m->vm, KVM_GET_PIT2, &s->pit);
    CALL(m->vm, KVM_GET_CLOCK, &s->clock);
    CALL(m->vcpu, KVM_GET_REGS, &s->regs);
    CALL(m->vcpu, KVM_GET_SREGS, &s->sregs);
    if (m->xsave_size > 4096)
        CALL(m->vcpu, KVM_GET_XSAVE2, s->xsave);
    else
        CALL(m->vcpu, KVM_GET_XSAVE, s->xsave);
    CALL(m->vcpu, KVM_GET_XCRS, &s->xcrs);
    CALL(m->vcpu, KVM_GET_DEBUGREGS, &s->debugregs);
    CALL(m->vcpu, KVM_GET_LAPIC, &s->lapic);
    CALL(m->vcpu, KVM_GET_MSRS, &s->msrs);
    CALL(m->vcpu, KVM_GET_VCPU_EVENTS, &s->events);
    s->has_tsc_offset = tsc_offset(m, KVM_GET_DEVICE_ATTR, &s->tsc_offset);
}

static void load(struct machine *m, struct state *s)
{
    CALL(m->vcpu, KVM_SET_REGS, &s->regs);
    CALL(m->vcpu, KVM_SET_XSAVE, s->xsave);
    CALL(m->vcpu, KVM_SET_XCRS, &s->xcrs);
    CALL(m->vcpu, KVM_SET_SREGS, &s->sregs);
    CALL(m->vcpu, KVM_SET_LAPIC, &s->lapic);
    if (CALL(m->vcpu, KVM_SET_MSRS, &s->msrs) != (int)s->msrs.head.nmsrs) {
        fprintf(stderr, "floor: KVM did not take an MSR back\n");
        exit(1);
    }
    if (s->has_tsc_offset)
        tsc_offset(m, KVM_SET_DEVICE_ATTR, &s->tsc_offset);
    for (int i = 0; i < 3; i++)
        CALL(m->vm, KVM_SET_IRQCHIP, &s->chips[i]);
    CALL(m->vm, KVM_SET_PIT2, &s->pit);
    s->clock.flags &= KVM_CLOCK_REALTIME;
    CALL(m->vm, KVM_SET_CLOCK, &s->clock);
    CALL(m->vcpu, KVM_SET_DEBUGREGS, &s->debugregs);
    CALL(m->vcpu, KVM_SET_VCPU_EVENTS, &s->events);
    CALL(m->vcpu, KVM_SET_MP_STATE, &s->mp);
}

/* --- the two processes ----------------------------------------------------------------------------------------- */

struct message { /* what goes through the socket: the state, and when it was complete */
    struct state state;
    double saved_at, stopped_at, began_at;
    unsigned ticks;
};

static atomic_int leaving;

static void wake_up(int signal) { (void)signal; }

static unsigned ticks_of(struct machine *m) { return *(volatile unsigned *)(m->ram + COUNT); }

static void *run_guest(void *argument)
{
    struct machine *m = argument;
    for (;;) {
        int result = ioctl(m->vcpu, KVM_RUN, 0);
        if (result < 0 && errno == EINTR) {
            if (atomic_load(&leaving))
                return 0;
        } else if (result < 0) {
            fail("KVM_RUN");
        } else {
            fprintf(stderr, "floor: the guest left with exit reason %u\n", m->run->exit_reason);
            exit(1);
        }
    }
}

static void wait_for_ticks(struct machine *m, unsigned wanted)
{
    double limit = now_ms() + 20000;
    while ((int)(ticks_of(m) - wanted) < 0) {
        if (now_ms() > limit) {
            fprintf(stderr, "floor: the guest stands at tick %u of %u\n", ticks_of(m), wanted);
            exit(1);
        }
        usleep(1000);
    }
}

static void write_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t count = write(fd, data, size);
        if (count <= 0)
            fail("write to the destination");
        data += count;
        size -= count;
    }
}

static void read_all(int fd, char *data, size_t size)
{
    while (size) {
        ssize_t count = read(fd, data, size);
        if (count <= 0)
            fail("read from the source");
        data += count;
        size -= count;
    }
}

static unsigned largest_gap(struct machine *m, unsigned first, unsigned end)
{
    volatile unsigned *ring = (volatile unsigned *)(m->ram + RING);
    unsigned largest = 0;
    for (unsigned n = first; n != end; n++)
        if (ring[n % RING_ENTRIES] > largest)
            largest = ring[n % RING_ENTRIES];
    return largest;
}

struct successor {
    struct machine m;
    struct message got;
    int channel;
    double received_at, loaded_at;
    atomic_int loaded;
};

/* The thread that will run the guest loads its state, too: a hop to another thread would be no part of a floor. */
static void *take_over(void *argument)
{
    struct successor *s = argument;
    read_all(s->channel, (char *)&s->got, sizeof s->got);
    s->received_at = now_ms();
    load(&s->m, &s->got.state);
    s->loaded_at = now_ms();
    atomic_store(&s->loaded, 1);
    return run_guest(&s->m);
}

static int destination(int ram, int channel, unsigned ticks)
{
    static struct successor s;
    struct message *got = &s.got;
    pthread_t thread;
    double khz;
    char ready = 'r';

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    s.m = make(ram);
    s.channel = channel;
    khz = CALL(s.m.vcpu, KVM_GET_TSC_KHZ, 0);
    pthread_create(&thread, 0, take_over, &s);
    write_all(channel, &ready, 1);
    while (!atomic_load(&s.loaded))
        usleep(1000);
    wait_for_ticks(&s.m, got->ticks + ticks);
    printf("{\"stop\": %.4f, \"save\": %.4f, \"send\": %.4f, \"load\": %.4f, \"total\": %.4f, ",
           got->stopped_at - got->began_at, got->saved_at - got->stopped_at, s.received_at - got->saved_at,
           s.loaded_at - s.received_at, s.loaded_at - got->began_at);
    printf("\"guest_pause\": %.4f, \"calm_longest\": %.4f, \"normal_gap\": %.4f, \"state_bytes\": %zu}\n",
           largest_gap(&s.m, got->ticks, got->ticks + 1) / khz,
           largest_gap(&s.m, got->ticks / 4, got->ticks) / khz, DIVISOR / PIT_HZ * 1e3, sizeof got->state);
    return 0;
}

int main(int argc, char **argv)
{
    static struct message sent;
    struct sigaction action = {.sa_handler = wake_up};
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = CODE, .rflags = 2};
    struct machine m;
    pthread_t thread;
    int ram, pair[2], status;
    unsigned ticks = argc > 1 ? atoi(argv[1]) : 200;
    char ready;

    if (ticks < 50 || ticks > RING_ENTRIES / 4) {
        fprintf(stderr, "floor: %u ticks; 50 to %u are possible\n", ticks, RING_ENTRIES / 4);
        return 1;
    }
    sigaction(SIGUSR1, &action, 0);
    ram = memfd_create("floor", MFD_CLOEXEC);
    if (ram < 0 || ftruncate(ram, RAM_SIZE) || socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        fail("setting up");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        close(pair[0]);
        return destination(ram, pair[1], ticks);
    }
    close(pair[1]);
    m = make(ram);
    memcpy(m.ram + CODE, guest_begin, guest_end - guest_begin);
    CALL(m.vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    CALL(m.vcpu, KVM_SET_SREGS, &sregs);
    list_msrs(&m, &sent.state);
    CALL(m.vcpu, KVM_SET_REGS, &regs);
    pthread_create(&thread, 0, run_guest, &m);
    wait_for_ticks(&m, ticks);
    read_all(pair[0], &ready, 1);

    sent.began_at = now_ms();
    atomic_store(&leaving, 1);
    m.run->immediate_exit = 1; /* holds if the signal comes before KVM_RUN; also finishes an instruction half done */
    pthread_kill(thread, SIGUSR1);
    pthread_join(thread, 0);
    sent.stopped_at = now_ms();
    sent.ticks = ticks_of(&m);
    save(&m, &sent.state);
    sent.saved_at = now_ms();
    write_all(pair[0], (char *)&sent, sizeof sent);
    if (waitpid(child, &status, 0) < 0 || status)
        return 1;
    return 0;
}
