/* The calls on KVM descriptors that are too many, or too hot, for Python. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <x86intrin.h>

/* --- small calls ------------------------------------------------------------------------------------------ */

/* Result of the ioctl, or minus errno: errno itself does not survive the way back into Python. */
static int tv_ioctl(int fd, unsigned long request, uintptr_t argument)
{
    int result;

    do {
        result = ioctl(fd, request, argument);
        /* KVM_CREATE_VM and some others give up on any signal; none of them has done anything by then. */
    } while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

static int tv_ioctl_ptr(int fd, unsigned long request, void *argument)
{
    return tv_ioctl(fd, request, (uintptr_t)argument);
}

/* EAX, EBX, ECX, EDX; zero if this processor has no such leaf. */
static void tv_host_cpuid(uint32_t function, uint32_t *registers)
{
    if (!__get_cpuid(function, &registers[0], &registers[1], &registers[2], &registers[3]))
        memset(registers, 0, 4 * sizeof *registers);
}

static int tv_irq_line(int vm, uint32_t gsi, uint32_t level)
{
    struct kvm_irq_level line = { .level = level };

    line.irq = gsi;
    return tv_ioctl_ptr(vm, KVM_IRQ_LINE, &line);
}

static int tv_get_dirty_log(int vm, uint32_t slot, void *bitmap)
{
    struct kvm_dirty_log log = { .slot = slot };

    log.dirty_bitmap = bitmap;
    return tv_ioctl_ptr(vm, KVM_GET_DIRTY_LOG, &log);
}

static int tv_clear_dirty_log(int vm, uint32_t slot, uint64_t first_page, uint32_t pages, void *bitmap)
{
    struct kvm_clear_dirty_log log = { .slot = slot, .num_pages = pages, .first_page = first_page };

    log.dirty_bitmap = bitmap;
    return tv_ioctl_ptr(vm, KVM_CLEAR_DIRTY_LOG, &log);
}

/* The kernel's default table (GSI n to PIC and IOAPIC pin n), then `count` message-signalled GSIs. */
static int tv_route_gsis(int vm, uint32_t count, const uint32_t *gsis, const uint64_t *addresses, const uint32_t *data)
{
    size_t most = 16 + 24 + (size_t)count;
    struct kvm_irq_routing *table = calloc(1, sizeof *table + most * sizeof table->entries[0]);
    struct kvm_irq_routing_entry *entry;
    int result;

    if (!table)
        return -ENOMEM;
    entry = table->entries;
    for (uint32_t pin = 0; pin < 16; pin++, entry++) {
        entry->gsi = pin;
        entry->type = KVM_IRQ_ROUTING_IRQCHIP;
        entry->u.irqchip.irqchip = pin < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
        entry->u.irqchip.pin = pin & 7;
    }
    for (uint32_t pin = 0; pin < 24; pin++, entry++) {
        entry->gsi = pin;
        entry->type = KVM_IRQ_ROUTING_IRQCHIP;
        entry->u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry->u.irqchip.pin = pin;
    }
    for (uint32_t i = 0; i < count; i++, entry++) {
        entry->gsi = gsis[i];
        entry->type = KVM_IRQ_ROUTING_MSI;
        entry->u.msi.address_lo = (uint32_t)addresses[i];
        entry->u.msi.address_hi = (uint32_t)(addresses[i] >> 32);
        entry->u.msi.data = data[i];
    }
    table->nr = (uint32_t)(entry - table->entries);
    result = tv_ioctl_ptr(vm, KVM_SET_GSI_ROUTING, table);
    free(table);
    return result;
}

/* Address of a shared, writable mapping, or 0 with *error set. */
static uintptr_t tv_map(int fd, uint64_t size, int *error)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

    if (at == MAP_FAILED) {
        *error = errno;
        return 0;
    }
    return (uintptr_t)at;
}

static void tv_unmap(uintptr_t address, uint64_t size)
{
    munmap((void *)address, size);
}

/* Advice only: a kernel that gives shmem no huge pages says EINVAL, and nothing is lost. */
static void tv_advise_huge(uintptr_t address, uint64_t size)
{
    (void)madvise((void *)address, size, MADV_HUGEPAGE);
}

/* Gives the pages of a shared mapping back: they are zero afterwards, and cost nothing. 0, or an errno. */
static int tv_forget(uintptr_t address, uint64_t size)
{
    return madvise((void *)address, size, MADV_REMOVE) ? errno : 0;
}

/* Whether a page of 4096 bytes is all zero. Most that are not say so in their first words. */
static int tv_page_is_zero(const uint64_t *words)
{
    for (int line = 0; line < 512; line += 8) {
        uint64_t any = 0;
        for (int word = 0; word < 8; word++)
            any |= words[line + word];
        if (any)
            return 0;
    }
    return 1;
}

/*
 * Finds the runs of pages that are not zero among `pages` pages at `address`: number of the first page, and how many,
 * of each. Returns how many runs there are; `runs` has room for two words a page.
 */
static uint32_t tv_data_runs(uintptr_t address, uint32_t pages, uint32_t *runs)
{
    uint32_t count = 0;
    int within = 0;

    for (uint32_t page = 0; page < pages; page++) {
        if (tv_page_is_zero((const uint64_t *)(address + (uintptr_t)page * 4096))) {
            within = 0;
            continue;
        }
        if (!within) {
            runs[2 * count] = page;
            runs[2 * count + 1] = 0;
            count++;
            within = 1;
        }
        runs[2 * count - 1]++;
    }
    return count;
}

static uint64_t tv_read_tsc(void)
{
    return __rdtsc();
}

static uint32_t cell_load(uint32_t *cell)
{
    return __atomic_load_n(cell, __ATOMIC_SEQ_CST);
}

/* The value before: `expected` if and only if the swap was made. A full barrier either way. */
static uint32_t cell_compare_and_swap(uint32_t *cell, uint32_t expected, uint32_t desired)
{
    __atomic_compare_exchange_n(cell, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}

#define TV_CPUID_MAX 256
#define TV_MSRS_MAX 1024

struct tv_cpuid {
    uint32_t count;
    uint32_t padding;
    struct kvm_cpuid_entry2 entries[TV_CPUID_MAX];
};

struct tv_msr_list {
    uint32_t count;
    uint32_t indices[TV_MSRS_MAX];
};

/* --- dirty rings ------------------------------------------------------------------------------------------ */

/* Of aarch64 alone in older headers; source: Linux, arch/x86/include/uapi/asm/kvm.h. */
#if KVM_DIRTY_LOG_PAGE_OFFSET == 0
#undef KVM_DIRTY_LOG_PAGE_OFFSET
#define KVM_DIRTY_LOG_PAGE_OFFSET 64
#endif

#define TV_RING_SLOTS 4

/*
 * What the vCPUs of one VM have put into their rings goes into one set of pages, by their place in the guest's RAM. A
 * page is in the set before its entry is given back, upon which KVM protects the page again: so whoever takes it out of
 * the set and then reads it has what was written, or finds it there again.
 */
struct tv_rings {
    int vm;
    uint32_t slots;
    uint64_t first[TV_RING_SLOTS]; /* the page at which each slot begins */
    uint64_t pages[TV_RING_SLOTS];
    uint64_t *map;                 /* the set; NULL while nobody wants to know */
    int lost;                      /* whether a ring was written over since that was said */
    pthread_mutex_t lock;
};

struct tv_ring {
    struct kvm_dirty_gfn *entries;
    uint32_t size;
    uint32_t next;
    uint64_t taken; /* entries so far */
    uint64_t relieved; /* how many of them when KVM last ran the vCPU no further */
};

static void tv_rings_prepare(struct tv_rings *rings, int vm)
{
    rings->vm = vm;
    pthread_mutex_init(&rings->lock, NULL);
}

/* With the lock held. A vCPU leaves some entries free. Where none is, it went on with a ring that was full. */
static void tv_ring_take(struct tv_rings *rings, struct tv_ring *ring)
{
    for (uint32_t begun = ring->next;;) {
        struct kvm_dirty_gfn *entry = &ring->entries[ring->next % ring->size];
        uint32_t slot = entry->slot & 0xffff;

        if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY) {
            rings->lost |= ring->next - begun >= ring->size;
            return;
        }
        if (rings->map && slot < rings->slots && entry->offset < rings->pages[slot]) {
            uint64_t page = rings->first[slot] + entry->offset;
            rings->map[page / 64] |= 1ull << page % 64;
        }
        __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        ring->next++;
        ring->taken++;
    }
}

/* --- running a vCPU --------------------------------------------------------------------------------------- */

#define TV_INTERRUPTED 0
#define TV_OUT 1
#define TV_IN 2
#define TV_STORE 3
#define TV_LOAD 4
#define TV_STOPPED 5
#define TV_FAILED 6

struct tv_cpu {
    int fd;
    struct kvm_run *run;
    uint64_t run_size;
    /* The access to be answered: of the guest's port or physical address, `size` bytes. */
    uint64_t address;
    uint64_t value;
    uint32_t size;
    uint32_t exit_reason;
    int error;
    struct tv_rings *rings; /* NULL where there are none */
    struct tv_ring ring;
    /* TV_IN or TV_LOAD while Python owes a value, else 0. */
    int owed;
    /* A string instruction exits once for many items: where the next one is, and how many are left. */
    uint32_t left;
    uint8_t *item;
};

static int tv_cpu_map(struct tv_cpu *cpu, int fd, uint64_t run_size)
{
    int error = 0;
    uintptr_t at = tv_map(fd, run_size, &error);

    if (!at)
        return -error;
    cpu->fd = fd;
    cpu->run = (struct kvm_run *)at;
    cpu->run_size = run_size;
    return 0;
}

static void tv_cpu_unmap(struct tv_cpu *cpu)
{
    if (cpu->run)
        munmap(cpu->run, cpu->run_size);
    cpu->run = NULL;
    if (cpu->ring.entries)
        munmap(cpu->ring.entries, cpu->ring.size * sizeof *cpu->ring.entries);
    cpu->ring.entries = NULL;
}

static int tv_cpu_map_ring(struct tv_cpu *cpu, struct tv_rings *rings, uint32_t size)
{
    void *at = mmap(NULL, size * sizeof(struct kvm_dirty_gfn), PROT_READ | PROT_WRITE, MAP_SHARED, cpu->fd,
                    (off_t)KVM_DIRTY_LOG_PAGE_OFFSET * 4096);

    if (at == MAP_FAILED)
        return -errno;
    cpu->ring.entries = at;
    cpu->ring.size = size;
    cpu->rings = rings;
    return 0;
}

/* Empties these rings; with `into`, moves the set of pages there. 0, or minus errno: EOVERFLOW if some are missing. */
static int tv_rings_collect(struct tv_rings *rings, struct tv_cpu **cpus, uint32_t count, uint64_t *into, uint64_t words)
{
    int result;

    pthread_mutex_lock(&rings->lock);
    for (uint32_t n = 0; n < count; n++)
        tv_ring_take(rings, &cpus[n]->ring);
    result = tv_ioctl(rings->vm, KVM_RESET_DIRTY_RINGS, 0);
    for (uint64_t word = 0; into && rings->map && word < words; word++) {
        into[word] |= rings->map[word];
        rings->map[word] = 0;
    }
    if (result >= 0)
        result = into && rings->lost ? -EOVERFLOW : 0;
    pthread_mutex_unlock(&rings->lock);
    return result;
}

/* Says where the pages go from here on; NULL: nowhere. */
static void tv_rings_use(struct tv_rings *rings, uint64_t *map)
{
    pthread_mutex_lock(&rings->lock);
    rings->map = map;
    rings->lost = 0;
    pthread_mutex_unlock(&rings->lock);
}

/*
 * KVM runs a vCPU whose ring is almost full no further. Whoever collects may have emptied it in that very moment. One
 * of which nothing was taken out since the last time has been written over: what was lost of it nobody knows.
 */
static int tv_ring_relieve(struct tv_cpu *cpu)
{
    int result = cpu->rings ? tv_rings_collect(cpu->rings, &cpu, 1, NULL, 0) : -ENODEV;
    uint64_t before = cpu->ring.relieved;

    cpu->ring.relieved = cpu->ring.taken;
    return result < 0 ? result : cpu->ring.taken == before ? -EOVERFLOW : 0;
}

static int tv_next_item(struct tv_cpu *cpu)
{
    int out = cpu->run->io.direction == KVM_EXIT_IO_OUT;

    cpu->value = 0;
    if (out) {
        memcpy(&cpu->value, cpu->item, cpu->size);
        cpu->item += cpu->size;
        cpu->left--;
        return TV_OUT;
    }
    cpu->owed = TV_IN;
    return TV_IN;
}

/*
 * Hand in the value that Python owes, if any, and go on to the next thing that Python must answer.
 *
 * An access that was answered is finished by the kernel at the next KVM_RUN, not before. So TV_INTERRUPTED, which
 * stands for EINTR, is the one result after which the guest's registers are whole: KVM_RUN looks at immediate_exit
 * and at signals only after it has completed the access (kvm_arch_vcpu_ioctl_run, complete_userspace_io).
 */
static int tv_run(struct tv_cpu *cpu)
{
    struct kvm_run *run = cpu->run;

    if (cpu->owed == TV_IN) {
        memcpy(cpu->item, &cpu->value, cpu->size);
        cpu->item += cpu->size;
        cpu->left--;
    } else if (cpu->owed == TV_LOAD) {
        memcpy(run->mmio.data, &cpu->value, cpu->size);
    }
    cpu->owed = 0;
    if (cpu->left)
        return tv_next_item(cpu);

    for (;;) {
        if (ioctl(cpu->fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR)
                return TV_INTERRUPTED;
            /* A processor that waited for its start-up interrupt got it: it runs from the next call on. */
            if (errno == EAGAIN)
                continue;
            cpu->error = errno;
            cpu->exit_reason = run->exit_reason;
            return TV_FAILED;
        }
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            cpu->address = run->io.port;
            cpu->size = run->io.size;
            cpu->left = run->io.count;
            cpu->item = (uint8_t *)run + run->io.data_offset;
            return tv_next_item(cpu);
        case KVM_EXIT_MMIO:
            cpu->address = run->mmio.phys_addr;
            cpu->size = run->mmio.len;
            cpu->value = 0;
            if (run->mmio.is_write) {
                memcpy(&cpu->value, run->mmio.data, cpu->size);
                return TV_STORE;
            }
            cpu->owed = TV_LOAD;
            return TV_LOAD;
        case KVM_EXIT_DIRTY_RING_FULL:
            cpu->error = -tv_ring_relieve(cpu);
            if (!cpu->error)
                continue;
            cpu->exit_reason = run->exit_reason;
            return TV_FAILED;
        case KVM_EXIT_INTR:
        case KVM_EXIT_IRQ_WINDOW_OPEN:
        case KVM_EXIT_SET_TPR:
        case KVM_EXIT_TPR_ACCESS:
        case KVM_EXIT_NMI:
        case KVM_EXIT_IOAPIC_EOI:
            /* Notices for a VMM that has its interrupt controllers in user space; here the kernel has them. */
            continue;
        default:
            cpu->exit_reason = run->exit_reason;
            return TV_STOPPED;
        }
    }
}

/* The data words of the last exit, for a report. */
static int tv_exit_words(struct tv_cpu *cpu, uint64_t *words, int room)
{
    struct kvm_run *run = cpu->run;
    int n = 0;

    switch (run->exit_reason) {
    case KVM_EXIT_INTERNAL_ERROR:
        words[n++] = run->internal.suberror;
        for (uint32_t i = 0; i < run->internal.ndata && i < 16 && n < room; i++)
            words[n++] = run->internal.data[i];
        break;
    case KVM_EXIT_FAIL_ENTRY:
        words[n++] = run->fail_entry.hardware_entry_failure_reason;
        words[n++] = run->fail_entry.cpu;
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        words[n++] = run->system_event.type;
        for (uint32_t i = 0; i < run->system_event.ndata && i < 16 && n < room; i++)
            words[n++] = run->system_event.data[i];
        break;
    case KVM_EXIT_UNKNOWN:
        words[n++] = run->hw.hardware_exit_reason;
        break;
    }
    return n;
}

static void tv_set_immediate_exit(struct tv_cpu *cpu, int on)
{
    __atomic_store_n(&cpu->run->immediate_exit, (uint8_t)on, __ATOMIC_SEQ_CST);
}

static void tv_kick_handler(int number)
{
    (void)number;
}

/*
 * The first real-time signal that is left to programs is often taken by debuggers and runtimes; the one after it is
 * ours. The handler does nothing: what counts is that the system call in progress returns, hence no SA_RESTART. It is
 * in C because a handler of Python's would run in the main thread and wake the loop each time.
 */
static int tv_kick_signal(void)
{
    return SIGRTMIN + 1;
}

static int tv_install_kick(void)
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    action.sa_handler = tv_kick_handler;
    return sigaction(tv_kick_signal(), &action, NULL) < 0 ? -errno : 0;
}

/* Called once on each thread that enters a guest: a mask inherited from whoever started us may block the signal. */
static void tv_admit_kick(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, tv_kick_signal());
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static int tv_kick(struct tv_cpu *cpu, int tid)
{
    tv_set_immediate_exit(cpu, 1);
    return syscall(SYS_tgkill, getpid(), tid, tv_kick_signal()) < 0 ? -errno : 0;
}

/* --- state ------------------------------------------------------------------------------------------------ */

#define MSR_IA32_TSC 0x10
#define MSR_IA32_APICBASE 0x1b
#define MSR_IA32_TSC_DEADLINE 0x6e0
#define MSR_KVM_WALL_CLOCK 0x11
#define MSR_KVM_SYSTEM_TIME 0x12
#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01
#define MSR_KVM_WALL_CLOCK_NEW 0x4b564d00

struct tv_msrs {
    uint32_t count;
    uint32_t padding;
    struct kvm_msr_entry entries[TV_MSRS_MAX];
};

struct tv_state {
    const char *failed; /* ioctl that returned an error, with its errno below */
    int error;
    uint32_t refused_msr;
    int has_sregs2;
    int has_xcrs;
    int has_deadline;
    uint32_t event_flags; /* those of struct kvm_vcpu_events that this host takes */
    uint32_t msr_count; /* of this host's list */
    uint32_t saved_msr_count; /* of the entries in msrs[] now */
    struct kvm_msr_entry clock_msrs[2]; /* withheld by tv_state_load_first for tv_state_take_up */
    uint32_t clock_msr_count;
    uint64_t taken_tsc_offset; /* what KVM made of tsc_offset: KVM-PVM leaves guests the host's TSC, and says nothing */
    uint32_t xsave_size;
    uint8_t *xsave;
    struct kvm_mp_state mp_state;
    struct kvm_regs regs;
    struct kvm_xcrs xcrs;
    struct kvm_sregs2 sregs;
    struct kvm_lapic_state lapic;
    struct kvm_debugregs debugregs;
    struct kvm_vcpu_events events;
    uint64_t tsc_offset;
    uint64_t tsc_deadline;
    struct kvm_msr_entry msrs[TV_MSRS_MAX];
    uint32_t indices[TV_MSRS_MAX];
    struct tv_msrs scratch;
};

#define STEP(state, call, name)                                                                                        \
    do {                                                                                                               \
        if ((call) < 0) {                                                                                              \
            (state)->failed = (name);                                                                                  \
            (state)->error = errno;                                                                                    \
            return -1;                                                                                                 \
        }                                                                                                              \
    } while (0)

/* Whether it was done. */
static int tv_one_msr(int vcpu, unsigned long request, uint32_t index, uint64_t *data)
{
    struct {
        uint32_t count;
        uint32_t padding;
        struct kvm_msr_entry entry;
    } one = { .count = 1, .entry = { .index = index, .data = *data } };
    int done = ioctl(vcpu, request, &one);

    *data = one.entry.data;
    return done == 1;
}

static int tv_msr_travels(uint32_t index)
{
    /* Hyper-V's: guests are not told of that interface, and some of these count time or fill pages of guest memory. */
    if (index >= 0x40000000 && index <= 0x400001ff)
        return 0;
    switch (index) {
    /* Goes with SREGS, before the LAPIC, whose registers are laid out by its mode. */
    case MSR_IA32_APICBASE:
    /* By offset: a write of the value would count the time between reading and writing as not passed. */
    case MSR_IA32_TSC:
    /* Last but one: KVM drops it unless the LAPIC's timer is in that mode already. */
    case MSR_IA32_TSC_DEADLINE:
    /*
     * Not state but a request: a write makes KVM store the time of boot in guest memory at once, which a process that
     * does not own the guest yet must not do. Guests write it anew each time they want to know.
     */
    case MSR_KVM_WALL_CLOCK:
    case MSR_KVM_WALL_CLOCK_NEW:
        return 0;
    }
    return 1;
}

/* Find, once and outside any pause, which of the listed MSRs this vCPU has. After KVM_SET_CPUID2, which decides it. */
static int tv_state_prepare(int vcpu, struct tv_state *state, const struct tv_msr_list *list)
{
    uint64_t data = 0;

    state->msr_count = 0;
    for (uint32_t i = 0; i < list->count && i < TV_MSRS_MAX; i++) {
        data = 0;
        if (tv_msr_travels(list->indices[i]) && tv_one_msr(vcpu, KVM_GET_MSRS, list->indices[i], &data))
            state->indices[state->msr_count++] = list->indices[i];
    }
    data = 0;
    state->has_deadline = tv_one_msr(vcpu, KVM_GET_MSRS, MSR_IA32_TSC_DEADLINE, &data);
    return 0;
}

/* Also makes KVM act on an INIT or start-up interrupt that is pending: hence before anything else is read. */
static int tv_state_save_mp(int vcpu, struct tv_state *state)
{
    STEP(state, ioctl(vcpu, KVM_GET_MP_STATE, &state->mp_state), "KVM_GET_MP_STATE");
    return 0;
}

static int tv_tsc_offset(int vcpu, unsigned long request, uint64_t *offset)
{
    struct kvm_device_attr attribute = {
        .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset
    };

    return ioctl(vcpu, request, &attribute);
}

static int tv_state_save(int vcpu, struct tv_state *state)
{
    int got;

    STEP(state, ioctl(vcpu, KVM_GET_REGS, &state->regs), "KVM_GET_REGS");
    if (state->has_sregs2)
        STEP(state, ioctl(vcpu, KVM_GET_SREGS2, &state->sregs), "KVM_GET_SREGS2");
    else {
        struct kvm_sregs old;

        STEP(state, ioctl(vcpu, KVM_GET_SREGS, &old), "KVM_GET_SREGS");
        memset(&state->sregs, 0, sizeof state->sregs);
        memcpy(&state->sregs, &old, offsetof(struct kvm_sregs, interrupt_bitmap));
    }
    if (state->xsave_size > sizeof(struct kvm_xsave))
        STEP(state, ioctl(vcpu, KVM_GET_XSAVE2, state->xsave), "KVM_GET_XSAVE2");
    else
        STEP(state, ioctl(vcpu, KVM_GET_XSAVE, state->xsave), "KVM_GET_XSAVE");
    if (state->has_xcrs)
        STEP(state, ioctl(vcpu, KVM_GET_XCRS, &state->xcrs), "KVM_GET_XCRS");
    STEP(state, ioctl(vcpu, KVM_GET_LAPIC, &state->lapic), "KVM_GET_LAPIC");

    for (uint32_t i = 0; i < state->msr_count; i++)
        state->scratch.entries[i] = (struct kvm_msr_entry){ .index = state->indices[i] };
    state->scratch.count = state->msr_count;
    STEP(state, got = ioctl(vcpu, KVM_GET_MSRS, &state->scratch), "KVM_GET_MSRS");
    if ((uint32_t)got != state->msr_count) {
        state->failed = "KVM_GET_MSRS";
        state->error = EINVAL;
        state->refused_msr = state->indices[got];
        return -1;
    }
    memcpy(state->msrs, state->scratch.entries, state->msr_count * sizeof state->msrs[0]);
    state->saved_msr_count = state->msr_count;

    STEP(state, tv_tsc_offset(vcpu, KVM_GET_DEVICE_ATTR, &state->tsc_offset), "KVM_GET_DEVICE_ATTR");
    STEP(state, ioctl(vcpu, KVM_GET_DEBUGREGS, &state->debugregs), "KVM_GET_DEBUGREGS");
    STEP(state, ioctl(vcpu, KVM_GET_VCPU_EVENTS, &state->events), "KVM_GET_VCPU_EVENTS");
    state->tsc_deadline = 0;
    if (state->has_deadline && !tv_one_msr(vcpu, KVM_GET_MSRS, MSR_IA32_TSC_DEADLINE, &state->tsc_deadline)) {
        state->failed = "KVM_GET_MSRS";
        state->error = EINVAL;
        state->refused_msr = MSR_IA32_TSC_DEADLINE;
        return -1;
    }
    return 0;
}

/*
 * Set msrs[0 .. saved_msr_count). KVM_SET_MSRS stops at the first one that it refuses. That does not matter when the
 * register has the value anyway (constants of the processor) or when the value is 0 (a feature the guest never used);
 * otherwise the guest would be changed, and that is an error that names the register.
 */
static int tv_load_msrs(int vcpu, struct tv_state *state)
{
    uint32_t next = 0;
    uint32_t kept = 0;

    /*
     * Setting these, KVM marks the clock page in guest memory at once, which may still be another process's. But a zero,
     * as in a reset, takes the page from KVM, which must not write into the next guest's memory.
     */
    state->clock_msr_count = 0;
    for (uint32_t i = 0; i < state->saved_msr_count; i++) {
        uint32_t index = state->msrs[i].index;

        if ((index != MSR_KVM_SYSTEM_TIME && index != MSR_KVM_SYSTEM_TIME_NEW) || state->msrs[i].data == 0)
            state->msrs[kept++] = state->msrs[i];
        else if (state->clock_msr_count < 2)
            state->clock_msrs[state->clock_msr_count++] = state->msrs[i];
    }
    state->saved_msr_count = kept;

    while (next < kept) {
        uint32_t count = kept - next;
        uint64_t present = 0;
        int done;

        state->scratch.count = count;
        memcpy(state->scratch.entries, state->msrs + next, count * sizeof state->msrs[0]);
        STEP(state, done = ioctl(vcpu, KVM_SET_MSRS, &state->scratch), "KVM_SET_MSRS");
        next += (uint32_t)done;
        if (next == kept)
            break;
        if (state->msrs[next].data != 0 &&
            !(tv_one_msr(vcpu, KVM_GET_MSRS, state->msrs[next].index, &present) && present == state->msrs[next].data)) {
            state->failed = "KVM_SET_MSRS";
            state->error = EINVAL;
            state->refused_msr = state->msrs[next].index;
            return -1;
        }
        next++;
    }
    return 0;
}

/*
 * What the machine's chips and clock build on: they deliver pending interrupts into the LAPICs as they are loaded, and
 * KVM decides by the TSC offsets of all vCPUs whether kvmclock counts by the TSC (the "master clock").
 */
static int tv_state_load_first(int vcpu, struct tv_state *state)
{
    /* Drops a pending exception, so VCPU_EVENTS comes later. */
    STEP(state, ioctl(vcpu, KVM_SET_REGS, &state->regs), "KVM_SET_REGS");
    STEP(state, ioctl(vcpu, KVM_SET_XSAVE, state->xsave), "KVM_SET_XSAVE");
    if (state->has_xcrs)
        STEP(state, ioctl(vcpu, KVM_SET_XCRS, &state->xcrs), "KVM_SET_XCRS");
    /* Carries IA32_APIC_BASE: KVM_SET_LAPIC reads its registers as xAPIC or x2APIC by it. */
    if (state->has_sregs2)
        STEP(state, ioctl(vcpu, KVM_SET_SREGS2, &state->sregs), "KVM_SET_SREGS2");
    else {
        struct kvm_sregs old;

        memset(&old, 0, sizeof old);
        memcpy(&old, &state->sregs, offsetof(struct kvm_sregs, interrupt_bitmap));
        STEP(state, ioctl(vcpu, KVM_SET_SREGS, &old), "KVM_SET_SREGS");
    }
    STEP(state, ioctl(vcpu, KVM_SET_LAPIC, &state->lapic), "KVM_SET_LAPIC");
    if (tv_load_msrs(vcpu, state) < 0)
        return -1;
    STEP(state, tv_tsc_offset(vcpu, KVM_SET_DEVICE_ATTR, &state->tsc_offset), "KVM_SET_DEVICE_ATTR");
    STEP(state, tv_tsc_offset(vcpu, KVM_GET_DEVICE_ATTR, &state->taken_tsc_offset), "KVM_GET_DEVICE_ATTR");
    return 0;
}

static int tv_state_load_last(int vcpu, struct tv_state *state)
{
    STEP(state, ioctl(vcpu, KVM_SET_DEBUGREGS, &state->debugregs), "KVM_SET_DEBUGREGS");
    /* Flags that say "this part is valid" of a part that is zero, and that this host does not know. */
    state->events.flags &= state->event_flags;
    STEP(state, ioctl(vcpu, KVM_SET_VCPU_EVENTS, &state->events), "KVM_SET_VCPU_EVENTS");
    if (state->has_deadline || state->tsc_deadline) {
        if (!tv_one_msr(vcpu, KVM_SET_MSRS, MSR_IA32_TSC_DEADLINE, &state->tsc_deadline) && state->tsc_deadline) {
            state->failed = "KVM_SET_MSRS";
            state->error = EINVAL;
            state->refused_msr = MSR_IA32_TSC_DEADLINE;
            return -1;
        }
    }
    STEP(state, ioctl(vcpu, KVM_SET_MP_STATE, &state->mp_state), "KVM_SET_MP_STATE");
    return 0;
}

/*
 * The rest of a load, which is the owner's: gives KVM the page that kvmclock is kept in. Its contents KVM works out at
 * the next KVM_RUN, from the TSC offset and the clock as they are then; so that this comes after both is right.
 */
static int tv_state_take_up(int vcpu, struct tv_state *state)
{
    for (uint32_t i = 0; i < state->clock_msr_count; i++) {
        uint64_t data = state->clock_msrs[i].data;

        if (!tv_one_msr(vcpu, KVM_SET_MSRS, state->clock_msrs[i].index, &data)) {
            state->failed = "KVM_SET_MSRS";
            state->error = EINVAL;
            state->refused_msr = state->clock_msrs[i].index;
            return -1;
        }
    }
    state->clock_msr_count = 0;
    /*
     * Tells the guest, at its next look at kvmclock, that it was stopped: its watchdogs then forgive the gap.
     * EINVAL: this guest has no kvmclock.
     */
    (void)ioctl(vcpu, KVM_KVMCLOCK_CTRL, 0);
    return 0;
}

/* --- chips and clock -------------------------------------------------------------------------------------- */

#define TV_TIME_SAME_BOOT 0
#define TV_TIME_ELSEWHERE 1
#define TV_TIME_STOOD_STILL 2

struct tv_moment {
    uint8_t boot_id[16]; /* of the host's kernel: its clocks and its TSC mean something only within one boot */
    uint64_t raw_ns; /* CLOCK_MONOTONIC_RAW, at the instant of kvm_clock_data.clock */
    uint64_t monotonic_ns; /* CLOCK_MONOTONIC, as the PIC was read */
    uint64_t host_tsc; /* at the instant of kvm_clock_data.clock */
    uint64_t realtime_ns; /* likewise */
};

struct tv_chips {
    const char *failed;
    int error;
    struct kvm_irqchip chips[3];
    struct kvm_pit_state2 pit;
    struct kvm_clock_data clock;
    struct tv_moment moment;
};

static uint64_t tv_now(clockid_t which)
{
    struct timespec now;

    clock_gettime(which, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/*
 * The three clocks and the TSC "at once". A thread that is preempted between two readings would make them part by
 * milliseconds, and the guest's clock step; so the closest of a few attempts counts.
 */
static void tv_moment_now(struct tv_moment *moment)
{
    uint64_t closest = UINT64_MAX;

    for (int attempt = 0; attempt < 8 && closest > 500; attempt++) {
        uint64_t before = tv_now(CLOCK_MONOTONIC_RAW);
        uint64_t realtime = tv_now(CLOCK_REALTIME);
        uint64_t monotonic = tv_now(CLOCK_MONOTONIC);
        uint64_t tsc = __rdtsc();
        uint64_t spread = tv_now(CLOCK_MONOTONIC_RAW) - before;

        if (spread < closest) {
            closest = spread;
            moment->raw_ns = before + spread / 2;
            moment->realtime_ns = realtime;
            moment->monotonic_ns = monotonic;
            moment->host_tsc = tsc;
        }
    }
}

/*
 * Read before the vCPUs' LAPICs: an interrupt on its way (the PIT goes on ticking in the kernel) is then seen in the
 * LAPIC at the latest, rather than in neither.
 */
static int tv_chips_save(int vm, struct tv_chips *chips)
{
    struct tv_moment now;

    chips->moment.monotonic_ns = tv_now(CLOCK_MONOTONIC);
    for (uint32_t i = 0; i < 3; i++) {
        chips->chips[i].chip_id = i;
        STEP(chips, ioctl(vm, KVM_GET_IRQCHIP, &chips->chips[i]), "KVM_GET_IRQCHIP");
    }
    STEP(chips, ioctl(vm, KVM_GET_PIT2, &chips->pit), "KVM_GET_PIT2");
    memset(&chips->clock, 0, sizeof chips->clock);
    STEP(chips, ioctl(vm, KVM_GET_CLOCK, &chips->clock), "KVM_GET_CLOCK");
    tv_moment_now(&now);
    /* KVM tells realtime and TSC of the same instant where it can; the raw clock of that instant follows from them. */
    chips->moment.raw_ns = now.raw_ns;
    chips->moment.realtime_ns = now.realtime_ns;
    chips->moment.host_tsc = now.host_tsc;
    if (chips->clock.flags & KVM_CLOCK_REALTIME) {
        chips->moment.raw_ns -= now.realtime_ns - chips->clock.realtime;
        chips->moment.realtime_ns = chips->clock.realtime;
    }
    if (chips->clock.flags & KVM_CLOCK_HOST_TSC)
        chips->moment.host_tsc = chips->clock.host_tsc;
    return 0;
}

/*
 * kvmclock must go on as the TSC does, whose offset is set already.
 *
 * Within one boot of the host kvmclock is CLOCK_MONOTONIC_RAW (with its offset since boot) plus a constant. So what has
 * passed on that clock is added; not what CLOCK_REALTIME says, which somebody may have set meanwhile. KVM reads a clock
 * itself, at the instant of setting, if it is given a realtime to count from: it gets one made up so that the outcome is
 * the raw clock's.
 *
 * Elsewhere CLOCK_REALTIME is all that two hosts share; the TSC offset was derived from it too.
 */
static int tv_load_clock(int vm, struct tv_chips *chips, int time)
{
    struct kvm_clock_data clock = { .clock = chips->clock.clock };
    int adjustable = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_ADJUST_CLOCK) & KVM_CLOCK_REALTIME;
    uint64_t since = chips->moment.realtime_ns;
    struct tv_moment now;

    tv_moment_now(&now);
    if (time == TV_TIME_SAME_BOOT)
        since = now.realtime_ns - (now.raw_ns - chips->moment.raw_ns);
    if (time != TV_TIME_STOOD_STILL) {
        if (adjustable) {
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = since;
        } else if (now.realtime_ns > since) {
            clock.clock += now.realtime_ns - since;
        }
    }
    STEP(chips, ioctl(vm, KVM_SET_CLOCK, &clock), "KVM_SET_CLOCK");
    return 0;
}

static int tv_pit_line(int vm, struct tv_chips *chips, uint32_t level)
{
    struct kvm_irq_level line = { .level = level };

    STEP(chips, ioctl(vm, KVM_IRQ_LINE, &line), "KVM_IRQ_LINE");
    return 0;
}

/*
 * The PIT raises its line and lowers it at once, from a kernel thread that no pause stops. Chips that were read in
 * between believe it to be high, and would not notice the next edge: so it is lowered first.
 *
 * KVM_SET_PIT2 has started a whole new period of channel 0. Ticks of the old one that fell due after the PIC was read
 * exist in the machine left behind and nowhere else: one of them, all that an edge can hold, is given here. Within one
 * boot of the host, that is, where count_load_time means something.
 */
static int tv_catch_up_pit(int vm, struct tv_chips *chips, int time)
{
    const struct kvm_pit_channel_state *channel = &chips->pit.channels[0];
    uint64_t count = channel->count ? channel->count : 0x10000;
    uint64_t period = count * 1000000000u / 1193181u;
    int64_t started = channel->count_load_time;
    int64_t read = (int64_t)chips->moment.monotonic_ns;
    int64_t now = (int64_t)tv_now(CLOCK_MONOTONIC);
    int periodic = (channel->mode == 2 || channel->mode == 3) && !(chips->pit.flags & KVM_PIT_FLAGS_HPET_LEGACY);

    if (tv_pit_line(vm, chips, 0) < 0)
        return -1;
    if (time != TV_TIME_SAME_BOOT || !periodic || period == 0 || started <= 0 || read < started || now < read)
        return 0;
    if ((uint64_t)(now - started) / period == (uint64_t)(read - started) / period)
        return 0;
    return tv_pit_line(vm, chips, 1) < 0 || tv_pit_line(vm, chips, 0) < 0 ? -1 : 0;
}

static int tv_chips_load(int vm, struct tv_chips *chips, int time)
{
    for (uint32_t i = 0; i < 3; i++) {
        chips->chips[i].chip_id = i;
        STEP(chips, ioctl(vm, KVM_SET_IRQCHIP, &chips->chips[i]), "KVM_SET_IRQCHIP");
    }
    STEP(chips, ioctl(vm, KVM_SET_PIT2, &chips->pit), "KVM_SET_PIT2");
    if (tv_catch_up_pit(vm, chips, time) < 0)
        return -1;
    return tv_load_clock(vm, chips, time);
}
