//! Tests of the congestion control in virtual time: what it keeps of a link, and how short it keeps the queue.

use std::time::Duration;

use super::delay_control::DelayControl;
use super::delay_simulation::{Control, Cubic, PACKET, Path, Simulation};

fn delay() -> Box<dyn Control> {
    Box::new(DelayControl::new(Duration::ZERO, PACKET))
}

fn cubic() -> Box<dyn Control> {
    Box::new(Cubic::new())
}

/// One greedy relocation alone on the path; prints a row (`--nocapture`) and returns it.
fn alone(label: &str, path: Path, seed: u64, seconds: u64) -> Simulation {
    let simulation = Simulation::run(path, vec![delay()], seed, seconds);
    println!(
        "{label:34} used {:5.1} %, 1st s {:5.1} %, queue p50 {:6.1} p99 {:6.1} ms, reply p50 {:6.1} p90 {:6.1} p99 {:6.1} max {:6.1} ms, lost {}",
        100.0 * simulation.share(0, 1, seconds),
        100.0 * simulation.share(0, 0, 1),
        simulation.queue_ms(50, 0),
        simulation.queue_ms(99, 0),
        simulation.reply_ms(50, 0),
        simulation.reply_ms(90, 0),
        simulation.reply_ms(99, 0),
        simulation.reply_ms(100, 0),
        simulation.flows[0].lost,
    );
    simulation
}

/// 100 Mbit/s, 40 ms: the round trip and the reply's time on the wire.
const FLOOR_MS: f64 = 40.0 + 5.6;

#[test]
fn demand_stays_fast_and_bulk_fills_the_link_whatever_the_router_queues() {
    for queue_ms in [10, 20, 50, 200, 1000] {
        let run = alone(&format!("100 Mbit/s 40 ms, queue {queue_ms} ms"), Path::new(100, 40, queue_ms), 1, 40);
        assert!(run.share(0, 1, 40) >= 0.90, "queue {queue_ms} ms");
        assert!(run.reply_ms(99, 0) <= FLOOR_MS + 30.0, "queue {queue_ms} ms");
        assert!(run.queue_ms(50, 2) <= 10.0, "queue {queue_ms} ms");
    }
}

#[test]
fn random_loss_costs_no_throughput() {
    for queue_ms in [10, 50, 1000] {
        let label = format!("... queue {queue_ms} ms, 0.1 % loss");
        let run = alone(&label, Path::new(100, 40, queue_ms).loss(0.001), 2, 40);
        assert!(run.share(0, 1, 40) >= 0.90, "queue {queue_ms} ms");
        // One reply in twenty loses a packet and waits for its second sending; the others stay below.
        assert!(run.reply_ms(90, 0) <= FLOOR_MS + 15.0, "queue {queue_ms} ms");
        assert!(run.reply_ms(99, 0) <= FLOOR_MS + 40.0 + 30.0, "queue {queue_ms} ms");
    }
}

#[test]
fn jitter_is_no_queue() {
    for (jitter_ms, queue_ms) in [(3, 10), (3, 50), (10, 1000)] {
        let label = format!("... queue {queue_ms} ms, jitter {jitter_ms} ms");
        let run = alone(&label, Path::new(100, 40, queue_ms).jitter_ms(jitter_ms), 3, 40);
        assert!(run.share(0, 2, 40) >= 0.90, "jitter {jitter_ms} ms, queue {queue_ms} ms");
        let allowed = FLOOR_MS + 30.0 + jitter_ms as f64;
        assert!(run.reply_ms(99, 0) <= allowed, "jitter {jitter_ms} ms, queue {queue_ms} ms");
    }
}

#[test]
fn a_long_fat_path_fills_within_seconds() {
    for (queue_ms, least) in [(50, 0.80), (1000, 0.90)] {
        let run = alone(&format!("1 Gbit/s 200 ms, queue {queue_ms} ms"), Path::new(1000, 200, queue_ms), 4, 10);
        assert!(run.share(0, 4, 10) >= least, "queue {queue_ms} ms");
    }
}

#[test]
fn slow_and_short_paths_work_as_well() {
    for (path, label) in [
        (Path::new(10, 40, 50), "10 Mbit/s 40 ms, queue 50 ms"),
        (Path::new(300, 5, 10), "300 Mbit/s 5 ms, queue 10 ms"),
        (Path::new(100, 80, 200), "100 Mbit/s 80 ms, queue 200 ms"),
        (Path::new(100, 40, 2), "100 Mbit/s 40 ms, queue 2 ms"),
    ] {
        let run = alone(label, path, 5, 15);
        assert!(run.share(0, 2, 15) >= 0.80, "{label}");
        assert!(run.queue_ms(99, 2) <= 16.0, "{label}");
    }
}

#[test]
fn a_path_that_becomes_longer_is_learned() {
    let run = alone("40 ms, from second 10 on 70 ms", Path::new(100, 40, 200).then(10, 100, 70), 6, 40);
    assert!(run.share(0, 11, 20) >= 0.4, "it must not starve until the old base is forgotten");
    assert!(run.share(0, 22, 40) >= 0.95, "and then fill the link again");
    assert!(run.queue_ms(99, 22) <= 12.0);
}

#[test]
fn a_path_that_becomes_shorter_is_learned_at_once() {
    let run = alone("70 ms, from second 10 on 40 ms", Path::new(100, 70, 200).then(10, 100, 40), 7, 30);
    assert!(run.share(0, 11, 30) >= 0.95);
    assert!(run.queue_ms(99, 12) <= 12.0);
}

#[test]
fn a_link_that_slows_down_is_not_flooded_and_one_that_speeds_up_is_used() {
    let slower = alone("100, from second 10 on 20 Mbit/s", Path::new(100, 40, 500).then(10, 20, 40), 8, 30);
    assert!(slower.share(0, 12, 30) >= 0.95);
    assert!(slower.queue_ms(99, 12) <= 16.0);
    let faster = alone("20, from second 10 on 200 Mbit/s", Path::new(20, 40, 500).then(10, 200, 40), 9, 30);
    assert!(faster.share(0, 13, 30) >= 0.95);
}

/// Two flows, the second three seconds later; returns their shares in the second half of a minute.
fn together(label: &str, queue_ms: u64, second: Box<dyn Control>) -> (f64, f64, Simulation) {
    let run = Simulation::run(Path::new(100, 40, queue_ms), vec![delay(), second], 1, 60);
    let shares = (run.share(0, 30, 60), run.share(1, 30, 60));
    println!("{label:34} {:.2} : {:.2}, queue p99 {:.1} ms", shares.0, shares.1, run.queue_ms(99, 0));
    (shares.0, shares.1, run)
}

#[test]
fn two_relocations_share_a_link_and_keep_its_queue_short() {
    let (first, second, run) = together("two of ours, queue 200 ms", 200, delay());
    assert!(first.min(second) >= 0.25 && first + second >= 0.95);
    assert!(run.queue_ms(99, 0) <= 20.0);
}

#[test]
fn beside_a_loss_based_flow_it_does_not_starve() {
    for queue_ms in [10, 50, 200] {
        let (ours, _, _) = together(&format!("beside Cubic, queue {queue_ms} ms"), queue_ms, cubic());
        assert!(ours >= 0.08, "queue {queue_ms} ms");
    }
}

#[test]
fn an_outage_falls_to_the_smallest_window_and_comes_back() {
    let mut control = DelayControl::new(Duration::ZERO, PACKET);
    let millis = Duration::from_millis;
    let before = control.window();
    control.on_loss(millis(500), millis(100), 5 * PACKET, true);
    assert_eq!(control.window(), 4 * PACKET);
    for step in 0..90 {
        control.on_ack(millis(1000 + step), millis(960 + step), PACKET, false);
        control.on_acks_end(millis(1000 + step));
    }
    assert!(control.window() >= before);
}

#[test]
fn an_idle_application_does_not_inflate_the_window() {
    let mut control = DelayControl::new(Duration::ZERO, PACKET);
    let millis = Duration::from_millis;
    for step in 0..10_000 {
        control.on_ack(millis(1000 + step), millis(960 + step), PACKET, true);
        control.on_acks_end(millis(1000 + step));
    }
    // Forty packets a round trip: twice of that, to send them without much pacing.
    assert!(control.window() <= 2 * 41 * PACKET, "{}", control.window());
}

#[test]
fn a_window_that_is_not_used_does_not_grow() {
    // Busy, but the processor sends only ten packets a round trip, of 50 us: a loopback, or a slow machine.
    let mut control = DelayControl::new(Duration::ZERO, PACKET);
    let before = control.window();
    for round in 0..100_000u64 {
        let sent = Duration::from_micros(50 * round);
        let now = sent + Duration::from_micros(50);
        for _ in 0..10 {
            control.on_ack(now, sent, PACKET, false);
        }
        control.on_acks_end(now);
    }
    assert!(control.window() <= before + 50 * PACKET, "{}", control.window());
}

#[test]
fn a_congestion_mark_lowers_the_window_once_per_round() {
    let mut control = DelayControl::new(Duration::ZERO, PACKET);
    let millis = Duration::from_millis;
    let before = control.window();
    control.on_loss(millis(100), millis(60), 0, false);
    let lowered = control.window();
    assert!(lowered < before && lowered * 10 > before * 8);
    control.on_loss(millis(101), millis(61), 0, false);
    assert_eq!(control.window(), lowered);
}
