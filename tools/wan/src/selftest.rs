//! Measures the relay with its own traffic on loopback: the rate it lets through when overdriven, and how far the delay
//! is off when it is not. Must not know: the relay's inside.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use clap::Args;
use nix::poll::{PollFd, PollFlags, poll};
use serde::Serialize;

use crate::batch::Receiver;
use crate::error::WanError;
use crate::link::{HEADER_BYTES, LinkOptions, Queue};
use crate::precision::make_this_thread_punctual;
use crate::sockets;
use crate::units::{Rate, Span};
use crate::wan::{Wan, WanOptions};

/// How long nothing must come, in milliseconds, for all to have come.
const QUIET_MS: u16 = 500;

/// Payload of a probe: 1,500 bytes on the wire.
const PAYLOAD: usize = 1472;

/// What to measure.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// The link's rate
    #[arg(long, default_value = "100Mbit/s")]
    pub rate: Rate,
    /// The link's round-trip time
    #[arg(long, value_name = "TIME", default_value = "40ms")]
    pub rtt: Span,
    /// How long each of the two measurements takes
    #[arg(long, value_name = "TIME", default_value = "2s")]
    pub time: Span,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was asked for.
    pub rate_bits_per_second: u64,
    /// What came out on the wire (payload + 28 bytes) while more than that was sent.
    pub achieved_bits_per_second: u64,
    /// Share of the rate by which it is off.
    pub rate_error: f64,
    /// Datagrams whose delay was measured, at 30 % of the rate.
    pub delay_samples: usize,
    /// How much later than delay + serialisation a datagram came, halfway through all.
    pub delay_error_p50_ms: f64,
    /// The same for the 99th of 100.
    pub delay_error_p99_ms: f64,
    /// The worst.
    pub delay_error_max_ms: f64,
    /// Datagrams that the relay or the kernel lost unasked.
    pub dropped_relay: u64,
    /// Share of one core that the relay's thread took when overdriven.
    pub relay_cpu: f64,
}

/// Measures and prints.
///
/// # Errors
/// [`WanError::SelfTest`] when the rate is off by more than 5 % or nothing arrives; what the relay's start says.
pub fn run(args: &SelftestArgs) -> Result<(), WanError> {
    let report = measure(args)?;
    if args.json {
        let json = serde_json::to_string_pretty(&report)
            .map_err(|error| WanError::System { action: "print the report", source: error.into() })?;
        println!("{json}");
    } else {
        println!("rate          {:>10.3} Mbit/s of {}", report.achieved_bits_per_second as f64 / 1e6, args.rate);
        println!("delay error   {:>10.3} ms p50 over {} datagrams", report.delay_error_p50_ms, report.delay_samples);
        println!("              {:>10.3} ms p99", report.delay_error_p99_ms);
        println!("              {:>10.3} ms max", report.delay_error_max_ms);
        println!("lost unasked  {:>10} datagrams", report.dropped_relay);
        println!("relay thread  {:>10.1} % of a core when overdriven", report.relay_cpu * 100.0);
    }
    if report.rate_error.abs() > 0.05 {
        return Err(WanError::SelfTest(format!("the rate is off by {:.1} %", report.rate_error * 100.0)));
    }
    Ok(())
}

/// Measures without printing.
///
/// # Errors
/// As [`run`], but for the rate.
pub fn measure(args: &SelftestArgs) -> Result<Report, WanError> {
    if args.rtt.0 > Duration::from_millis(u64::from(QUIET_MS)) {
        return Err(WanError::Usage(format!("--rtt: the self-test waits for at most {QUIET_MS} ms")));
    }
    if args.time.0.is_zero() || args.time.0 > Duration::from_secs(60) {
        return Err(WanError::Usage("--time must be more than 0 and at most 60s".into()));
    }
    let link =
        LinkOptions { rate: Some(args.rate), queue: Queue::Time(Duration::from_millis(20)), ..Default::default() }
            .with_rtt(args.rtt.0);

    let overdriven = Probe::start(link)?;
    let started = Instant::now();
    let arrivals = overdriven.exchange(args.rate, 1.3, args.time.0)?;
    let busy = started.elapsed();
    let stats = overdriven.wan.stats()?;
    let (Some(first), Some(last)) = (arrivals.first(), arrivals.last()) else {
        return Err(WanError::SelfTest("no datagram arrived".into()));
    };
    let wire_bits = (arrivals.len() as u64 - 1) * (PAYLOAD as u64 + HEADER_BYTES) * 8;
    let span = (last.received - first.received).as_secs_f64();
    let achieved = if span > 0.0 { wire_bits as f64 / span } else { 0.0 };
    let dropped = stats.up.dropped_relay;

    let calm = Probe::start(link)?;
    let arrivals = calm.exchange(args.rate, 0.3, args.time.0)?;
    let dropped = dropped + calm.wan.stats()?.up.dropped_relay;
    let expected = link.delay + args.rate.time_for(PAYLOAD as u64 + HEADER_BYTES);
    let mut errors: Vec<f64> = arrivals
        .iter()
        .map(|arrival| ((arrival.received - arrival.sent).as_secs_f64() - expected.as_secs_f64()) * 1e3)
        .collect();
    errors.sort_by(f64::total_cmp);
    let at = |share: f64| errors.get((errors.len() as f64 * share) as usize).or(errors.last()).copied();
    let (Some(p50), Some(p99), Some(max)) = (at(0.5), at(0.99), at(1.0)) else {
        return Err(WanError::SelfTest("no datagram arrived".into()));
    };
    Ok(Report {
        rate_bits_per_second: args.rate.bits_per_second(),
        achieved_bits_per_second: achieved as u64,
        rate_error: achieved / args.rate.bits_per_second() as f64 - 1.0,
        delay_samples: errors.len(),
        delay_error_p50_ms: p50,
        delay_error_p99_ms: p99,
        delay_error_max_ms: max,
        dropped_relay: dropped,
        relay_cpu: stats.cpu_s / busy.as_secs_f64(),
    })
}

/// A relay with a receiver behind it.
struct Probe {
    wan: Wan,
    receiver: UdpSocket,
}

/// When a probe was sent and came, since the exchange began.
struct Arrival {
    sent: Duration,
    received: Duration,
}

impl Probe {
    fn start(link: LinkOptions) -> Result<Probe, WanError> {
        let failed = WanError::system("open the receiving socket");
        let receiver = sockets::listening((Ipv4Addr::LOCALHOST, 0).into()).map_err(failed)?;
        let to = receiver.local_addr().map_err(WanError::system("ask for the receiver's address"))?;
        Ok(Probe { wan: Wan::start(WanOptions::new(to, link))?, receiver })
    }

    /// Sends at `share` of the rate for `time` and collects what arrives until it is quiet.
    fn exchange(&self, rate: Rate, share: f64, time: Duration) -> Result<Vec<Arrival>, WanError> {
        let failed = WanError::system("open the sending socket");
        let sender = sockets::connected(self.wan.local_addr()).map_err(failed)?;
        let gap = rate.time_for(PAYLOAD as u64 + HEADER_BYTES).div_f64(share);
        let epoch = Instant::now();
        let sending = std::thread::spawn(move || send_paced(&sender, epoch, gap, time));
        let arrivals = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| collect(&self.receiver, epoch, || sending.is_finished()));
            receiving.join()
        });
        let failed = |_| WanError::SelfTest("a thread of the test failed".into());
        sending.join().map_err(failed)?;
        arrivals.map_err(failed)
    }
}

/// Sends on time on average: after a hold-up it catches up. Each datagram carries the time of its own sending.
fn send_paced(sender: &UdpSocket, epoch: Instant, gap: Duration, time: Duration) {
    make_this_thread_punctual();
    let mut payload = [0; PAYLOAD];
    let mut due = Duration::ZERO;
    while due < time {
        let now = epoch.elapsed();
        if now < due {
            std::thread::sleep(due - now);
        }
        payload[..8].copy_from_slice(&(epoch.elapsed().as_nanos() as u64).to_le_bytes());
        // A full send buffer loses the probe, which the rate then shows.
        let _ = sender.send(&payload);
        due += gap;
    }
}

/// Takes what arrives until it is quiet after the end of the sending.
fn collect(receiver: &UdpSocket, epoch: Instant, is_over: impl Fn() -> bool) -> Vec<Arrival> {
    make_this_thread_punctual();
    let (mut arrivals, mut batch) = (Vec::new(), Receiver::default());
    loop {
        let over_before = is_over();
        let mut fds = [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, QUIET_MS).unwrap_or(0);
        if batch.receive(receiver.as_fd()).is_err() {
            if ready == 0 && over_before {
                return arrivals;
            }
            continue;
        }
        let received = epoch.elapsed();
        let stamps = batch.datagrams().filter_map(|(_, payload)| payload.first_chunk::<8>().copied());
        arrivals.extend(stamps.map(|s| Arrival { sent: Duration::from_nanos(u64::from_le_bytes(s)), received }));
    }
}
