//! The link in virtual time.

use super::*;

const MBIT_100: u64 = 100_000_000;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

fn link(options: LinkOptions) -> Link {
    Link::new(options, Rng::seeded(1))
}

fn at_100_mbit(queue: Queue) -> LinkOptions {
    LinkOptions { rate: Rate::from_bits_per_second(MBIT_100), queue, delay: ms(20), ..LinkOptions::default() }
}

fn delivered(decision: Decision) -> Duration {
    match decision {
        Decision::Deliver { at } => at,
        Decision::Drop(reason) => panic!("dropped: {reason:?}"),
    }
}

/// 1,472 bytes of payload are 1,500 on the wire: 120 us at 100 Mbit/s.
const PAYLOAD: usize = 1472;

#[test]
fn a_packet_takes_its_serialisation_and_the_delay() {
    let mut link = link(at_100_mbit(Queue::Time(ms(100))));
    assert_eq!(delivered(link.offer(ms(1), PAYLOAD)), ms(21) + us(120));
    assert_eq!(delivered(link.offer(ms(1), PAYLOAD)), ms(21) + us(240), "the second waits for the first");
    assert_eq!(delivered(link.offer(ms(50), PAYLOAD)), ms(70) + us(120), "an idle link has forgotten both");
}

#[test]
fn without_a_rate_only_the_delay_remains() {
    let mut link = link(LinkOptions { delay: ms(5), queue: Queue::Bytes(1), ..LinkOptions::default() });
    for _ in 0..1000 {
        assert_eq!(delivered(link.offer(ms(1), 65_507)), ms(6));
    }
}

#[test]
fn carries_exactly_its_rate_when_overdriven() {
    let mut link = link(at_100_mbit(Queue::Time(ms(10))));
    let mut last = Duration::ZERO;
    for i in 0..20_000u64 {
        // Twice the rate: a packet every 60 us for 1.2 s.
        if let Decision::Deliver { at } = link.offer(us(60 * i), PAYLOAD) {
            assert!(at > last);
            last = at;
        }
    }
    let stats = link.stats(ms(1200));
    let sent = Rate::from_bits_per_second(MBIT_100).unwrap().bytes_in(ms(1200) + ms(10));
    assert!(stats.wire_bytes.abs_diff(sent) < 3000, "{} against {sent}", stats.wire_bytes);
    assert_eq!(stats.dropped_queue + stats.packets, 20_000);
    assert!((stats.max_queue_delay_ms - 10.0).abs() < 0.13, "{}", stats.max_queue_delay_ms);
    assert_eq!(stats.wire_bytes, stats.payload_bytes + stats.packets * HEADER_BYTES);
}

#[test]
fn a_byte_queue_holds_so_many_bytes() {
    let mut link = link(at_100_mbit(Queue::Bytes(4500)));
    let taken = (0..10).filter(|_| matches!(link.offer(ms(0), PAYLOAD), Decision::Deliver { .. })).count();
    assert_eq!(taken, 3);
    assert_eq!(link.stats(ms(0)).queue_bytes, 4500);
    assert_eq!(link.offer(us(119), PAYLOAD), Decision::Drop(DropReason::Queue));
    delivered(link.offer(us(120), PAYLOAD));
}

#[test]
fn a_queue_shorter_than_a_packet_still_passes_one_at_a_time() {
    for queue in [Queue::Bytes(0), Queue::Time(Duration::ZERO)] {
        let mut link = link(at_100_mbit(queue));
        delivered(link.offer(ms(0), PAYLOAD));
        assert_eq!(link.offer(ms(0), PAYLOAD), Decision::Drop(DropReason::Queue));
        delivered(link.offer(us(120), PAYLOAD));
    }
}

#[test]
fn lost_packets_used_the_wire() {
    let loss = Probability::new(0.1).unwrap();
    let mut link = link(LinkOptions { loss, ..at_100_mbit(Queue::Time(ms(100))) });
    let lost = (0..10_000).filter(|i| link.offer(us(200 * i), 1000) == Decision::Drop(DropReason::Loss)).count();
    assert!((900..1100).contains(&lost), "{lost}");
    let stats = link.stats(ms(0));
    assert_eq!((stats.packets, stats.dropped_loss), (10_000, lost as u64));
}

#[test]
fn total_loss_and_no_loss_are_exact() {
    let mut all = link(LinkOptions { loss: Probability::new(1.0).unwrap(), ..LinkOptions::default() });
    let mut none = link(LinkOptions::default());
    for i in 0..1000 {
        assert_eq!(all.offer(us(i), 100), Decision::Drop(DropReason::Loss));
        delivered(none.offer(us(i), 100));
    }
}

#[test]
fn jitter_keeps_order_and_mean_and_really_varies() {
    let mut link = link(LinkOptions { delay: ms(50), jitter: ms(10), ..LinkOptions::default() });
    let (mut last, mut delays) = (Duration::ZERO, Vec::new());
    for i in 0..200_000u64 {
        let at = delivered(link.offer(us(120 * i), PAYLOAD));
        assert!(at >= last);
        last = at;
        delays.push((at - us(120 * i)).as_secs_f64() * 1e3);
    }
    let mean = delays.iter().sum::<f64>() / delays.len() as f64;
    assert!((mean - 50.0).abs() < 1.0, "{mean}");
    let (low, high) = delays.iter().fold((f64::MAX, 0f64), |(l, h), d| (l.min(*d), h.max(*d)));
    assert!((40.0..43.0).contains(&low) && (57.0..=60.0).contains(&high), "{low} {high}");
}

#[test]
fn reordering_happens_only_when_asked_for() {
    let mut link = link(LinkOptions { delay: ms(50), jitter: ms(10), reorder: true, ..LinkOptions::default() });
    let times: Vec<Duration> = (0..1000).map(|i| delivered(link.offer(us(120 * i), PAYLOAD))).collect();
    assert!(times.windows(2).any(|w| w[1] < w[0]));
    for (i, at) in times.iter().enumerate() {
        let delay = *at - us(120 * i as u64);
        assert!(delay >= ms(40) && delay <= ms(60));
    }
}

#[test]
fn jitter_larger_than_the_delay_never_goes_back_in_time() {
    for reorder in [false, true] {
        let mut link = link(LinkOptions { delay: ms(1), jitter: ms(30), reorder, ..LinkOptions::default() });
        for i in 0..10_000 {
            let now = us(100 * i);
            assert!(delivered(link.offer(now, 100)) >= now);
        }
    }
}

#[test]
fn a_cut_takes_what_is_offered_and_what_is_due() {
    let mut link = link(at_100_mbit(Queue::Time(ms(100))));
    delivered(link.offer(ms(0), PAYLOAD));
    link.cut();
    assert_eq!(link.offer(ms(1), PAYLOAD), Decision::Drop(DropReason::Cut));
    assert!(!link.depart());
    link.mend();
    delivered(link.offer(ms(30), PAYLOAD));
    assert!(link.depart());
    link.delivered(1);
    let stats = link.stats(ms(50));
    assert_eq!((stats.offered_packets, stats.delivered_packets, stats.dropped_cut), (3, 1, 2));
    assert_eq!(stats.packets, 2, "what was cut off at once never used the wire");
}

#[test]
fn packets_beyond_the_mtu_are_dropped() {
    let mut link = link(LinkOptions { mtu: Some(1500), ..LinkOptions::default() });
    delivered(link.offer(ms(0), 1472));
    assert_eq!(link.offer(ms(0), 1473), Decision::Drop(DropReason::Mtu));
}

#[test]
fn a_new_rate_keeps_the_bytes_that_wait() {
    let mut link = link(at_100_mbit(Queue::Time(ms(100))));
    for _ in 0..10 {
        delivered(link.offer(ms(0), PAYLOAD));
    }
    assert_eq!(link.stats(ms(0)).queue_bytes, 15_000);
    link.change(ms(0), LinkChange { rate: Some(Rate::from_bits_per_second(10_000_000)), ..LinkChange::default() });
    assert_eq!(link.stats(ms(0)).queue_bytes, 15_000);
    assert_eq!(delivered(link.offer(ms(0), PAYLOAD)), ms(20) + us(13_200));
}

#[test]
fn a_shorter_delay_does_not_let_packets_overtake() {
    let mut link = link(LinkOptions { delay: ms(100), ..LinkOptions::default() });
    assert_eq!(delivered(link.offer(ms(0), 100)), ms(100));
    link.change(ms(10), LinkChange { delay: Some(ms(1)), ..LinkChange::default() });
    assert_eq!(delivered(link.offer(ms(10), 100)), ms(100));
    assert_eq!(delivered(link.offer(ms(200), 100)), ms(201));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let options =
        LinkOptions { loss: Probability::new(0.3).unwrap(), jitter: ms(3), ..at_100_mbit(Queue::Bytes(20_000)) };
    let run = |seed| -> Vec<Decision> {
        let mut link = Link::new(options, Rng::seeded(seed));
        (0..2000).map(|i| link.offer(us(100 * i), (i as usize * 37) % 1400)).collect()
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

#[test]
fn reset_clears_the_counters_and_nothing_else() {
    let mut link = link(at_100_mbit(Queue::Time(ms(100))));
    delivered(link.offer(ms(0), PAYLOAD));
    link.reset_stats();
    assert_eq!(link.stats(ms(1)), DirectionStats::default());
    assert_eq!(link.options().delay, ms(20));
    assert!(link.depart());
    link.delivered(1);
    assert_eq!(link.stats(ms(30)).delivered_packets, 1);
}
