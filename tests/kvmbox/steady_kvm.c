/*
 * Keeps the kernel of the box from patching KVM's code while guests run. Linked statically.
 *
 * KVM has three counts of unusual vCPUs (without an in-kernel APIC; with one that is off by its base register; with one
 * that is off by its spurious vector, as each is at reset) that are static keys: code is patched whenever one leaves or
 * reaches zero, so whenever a VM comes or goes (Linux: arch/x86/kvm/lapic.h, struct static_key_false_deferred). The
 * patched place is a breakpoint for a moment, and TCG's other processor may meet it when the kernel is through with it,
 * which is the end of the box ("Oops: int3"). With one such vCPU each that stays, no count reaches zero.
 *
 * Returns when they are made, and leaves a process that holds them.
 */
#define _DEFAULT_SOURCE /* daemon */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define APIC_ON 0x800u /* in the APIC's base register */

static int checked(int result, const char *call)
{
    if (result < 0) {
        perror(call);
        exit(1);
    }
    return result;
}

static int make_vcpu(int kvm, int with_apic)
{
    int vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    if (with_apic)
        checked(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    return checked(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
}

int main(void)
{
    struct kvm_sregs registers;
    int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");

    make_vcpu(kvm, 0);
    make_vcpu(kvm, 1);
    int off = make_vcpu(kvm, 1);
    checked(ioctl(off, KVM_GET_SREGS, &registers), "KVM_GET_SREGS");
    registers.apic_base &= ~(unsigned long long)APIC_ON;
    checked(ioctl(off, KVM_SET_SREGS, &registers), "KVM_SET_SREGS");

    checked(daemon(0, 0), "daemon");
    for (;;)
        pause();
}
