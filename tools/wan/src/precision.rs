//! Makes the calling thread as punctual as the system allows it to be. All of it is optional: without privileges, and
//! on older kernels, the thread is merely later under load, which the counters show. Must not know: what the thread
//! does.

use std::mem;

use nix::libc;

/// The shortest time slice that a thread may ask for (kernel/sched/syscalls.c clamps to 0.1 to 100 ms, since Linux
/// 6.12). A thread with a short slice is run sooner after it wakes.
const SLICE_NANOS: u64 = 100_000;

/// Asks for exact timers and prompt scheduling of the calling thread.
///
/// The lowest real-time priority where that is permitted: routers do not compete with programs for a processor either.
pub fn make_this_thread_punctual() {
    // Without this the kernel rounds sleeps up by 50 us. Not vital: a refusal only costs precision.
    let _ = nix::sys::prctl::set_timerslack(1);
    let realtime = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread; the kernel only reads the parameter, which is valid for the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &raw const realtime) } == 0 {
        return;
    }
    // SAFETY: a plain C structure for which all-zero is a valid value (SCHED_OTHER, no flags).
    let mut attributes: libc::sched_attr = unsafe { mem::zeroed() };
    attributes.size = mem::size_of::<libc::sched_attr>() as u32;
    attributes.sched_runtime = SLICE_NANOS;
    // SAFETY: as above; the size tells the kernel how much to read. A refusal only costs precision.
    let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}
