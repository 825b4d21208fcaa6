//! Every promise of the scheduler: against a reference model under random events, and one by one.

#[path = "tests_link.rs"]
mod link;
#[path = "tests_model.rs"]
mod model;

use proptest::prelude::*;

use super::*;
use crate::core::ids::BlockIndex;
use model::{Op, World};

fn any_class() -> impl Strategy<Value = Class> {
    prop_oneof![1 => Just(Class::Demand), 1 => Just(Class::Readahead), 3 => Just(Class::Bulk)]
}

fn any_op() -> impl Strategy<Value = Op> {
    let volume = 0..4u32;
    let peer = 0..3u32;
    let which = any::<usize>();
    prop_oneof![
        24 => (volume.clone(), 0..9u64, any_class(), proptest::bool::weighted(0.8))
            .prop_map(|(volume, block, class, with_id)| Op::Want { volume, block, class, with_id }),
        5 => which.prop_map(|which| Op::Cancel { which }),
        16 => (which, proptest::bool::weighted(0.15)).prop_map(|(which, is_hit)| Op::LookedUp { which, is_hit }),
        10 => (which, 0..=8u64).prop_map(|(which, wire_eighths)| Op::Arrived { which, wire_eighths }),
        4 => which.prop_map(|which| Op::Failed { which, failure: Failure::Transient }),
        4 => which.prop_map(|which| Op::Failed { which, failure: Failure::Permanent }),
        1 => which.prop_map(|which| Op::Late { which }),
        3 => peer.clone().prop_map(|peer| Op::Up { peer }),
        2 => peer.clone().prop_map(|peer| Op::Down { peer }),
        3 => (volume.clone(), any::<bool>()).prop_map(|(volume, is_paused)| Op::Pause { volume, is_paused }),
        2 => (volume.clone(), proptest::option::of(20_000..2_000_000u64))
            .prop_map(|(volume, bytes_per_s)| Op::Rate { volume, bytes_per_s }),
        1 => proptest::option::of(20_000..2_000_000u64).prop_map(|bytes_per_s| Op::SiteRate { bytes_per_s }),
        2 => (peer.clone(), 0..400_000u64).prop_map(|(peer, bytes)| Op::Window { peer, bytes }),
        2 => volume.clone().prop_map(|volume| Op::Remove { volume }),
        3 => (volume, peer).prop_map(|(volume, peer)| Op::Add { volume, peer }),
        4 => (1..2000u64).prop_map(|ms| Op::Step { ms }),
        3 => Just(Op::StepToDeadline),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn does_what_the_model_does(
        peers in 1..=3u32,
        volumes in 1..=4u32,
        ops in proptest::collection::vec(any_op(), 1..140),
    ) {
        let limits = Limits { demand_flights: 3, readahead_flights: 2, bulk_window_bytes: 200_000, bulk_min_share: 0.1 };
        let mut world = World::new(limits, peers, volumes);
        for op in ops {
            world.apply(op);
        }
        world.settle();
    }
}

const A: VolumeKey = VolumeKey(0);
const B: VolumeKey = VolumeKey(1);
const PEER_A: PeerKey = PeerKey(0);
const PEER_B: PeerKey = PeerKey(1);
const T0: Now = Duration::from_secs(1);

fn at(volume: VolumeKey, block: u64) -> Place {
    Place { volume, block: BlockIndex(block) }
}

fn id(number: u8) -> BlockId {
    BlockId([number; 32])
}

/// Volume A at one peer and B at another, or the same one; both up.
fn two_volumes(limits: Limits, peer_of_b: PeerKey) -> Scheduler {
    let mut scheduler = Scheduler::new(limits);
    scheduler.add_volume(A, PEER_A);
    scheduler.add_volume(B, peer_of_b);
    scheduler.peer_up(T0, PEER_A);
    scheduler.peer_up(T0, peer_of_b);
    scheduler
}

fn want(scheduler: &mut Scheduler, waiter: u64, place: Place, id: Option<BlockId>, class: Class) {
    scheduler.want(T0, WantBlock { waiter: WaiterId(waiter), place, id, class, len_bytes: 65536 });
}

fn drain(scheduler: &mut Scheduler) -> Vec<Action> {
    std::iter::from_fn(|| scheduler.poll_action()).collect()
}

/// The flights and places that were asked for; any other action is a failure.
fn sends(scheduler: &mut Scheduler) -> Vec<(FlightId, PeerKey, Place, Class)> {
    let sent = |action| match action {
        Action::Send { flight, peer, place, class } => (flight, peer, place, class),
        other => panic!("{other:?}"),
    };
    drain(scheduler).into_iter().map(sent).collect()
}

/// Wants with an id that the store does not have.
fn want_missing(scheduler: &mut Scheduler, waiter: u64, place: Place, id: BlockId, class: Class) -> FlightId {
    want(scheduler, waiter, place, Some(id), class);
    match drain(scheduler)[..] {
        [Action::LookUp { flight, .. }] => {
            assert_eq!(scheduler.looked_up(T0, flight, false), None);
            flight
        }
        ref other => panic!("{other:?}"),
    }
}

fn waiters_of(landed: Option<Landed>) -> Vec<u64> {
    landed.map(|landed| landed.waiters.iter().map(|waiter| waiter.id.0).collect()).unwrap_or_default()
}

#[test]
fn demand_overtakes_queued_bulk() {
    let limits = Limits { bulk_window_bytes: 65536, ..Limits::default() };
    let mut scheduler = two_volumes(limits, PEER_A);
    for block in 0..10 {
        want(&mut scheduler, block, at(A, block), None, Class::Bulk);
    }
    want(&mut scheduler, 10, at(A, 100), None, Class::Readahead);
    // Bulk has asked for this one, too, and stands behind eight others.
    want(&mut scheduler, 11, at(A, 9), None, Class::Demand);
    let order: Vec<(u64, Class)> = sends(&mut scheduler).iter().map(|s| (s.2.block.0, s.3)).collect();
    assert_eq!(order, [(0, Class::Bulk), (100, Class::Readahead), (9, Class::Demand)]);
}

#[test]
fn demand_goes_before_readahead_where_both_have_waited() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    scheduler.peer_down(T0, PEER_A);
    want(&mut scheduler, 0, at(A, 0), None, Class::Bulk);
    want(&mut scheduler, 1, at(A, 1), None, Class::Readahead);
    want(&mut scheduler, 2, at(A, 2), None, Class::Demand);
    assert_eq!(drain(&mut scheduler), []);
    scheduler.peer_up(T0, PEER_A);
    let order: Vec<u64> = sends(&mut scheduler).iter().map(|s| s.2.block.0).collect();
    assert_eq!(order, [2, 1, 0]);
}

#[test]
fn bulk_under_way_is_promoted_once() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    want(&mut scheduler, 0, at(A, 0), None, Class::Bulk);
    let (flight, ..) = sends(&mut scheduler)[0];
    want(&mut scheduler, 1, at(A, 0), None, Class::Demand);
    assert_eq!(drain(&mut scheduler), [Action::Promote { flight, peer: PEER_A, class: Class::Demand }]);
    assert_eq!(scheduler.in_flight(PEER_A), [1, 0, 0]);
    want(&mut scheduler, 2, at(A, 0), None, Class::Demand);
    want(&mut scheduler, 3, at(A, 0), None, Class::Readahead);
    assert_eq!(drain(&mut scheduler), []);
    let landed = scheduler.arrived(T0, flight, 65536);
    assert_eq!(landed.as_ref().map(|landed| landed.class), Some(Class::Demand));
    assert_eq!(waiters_of(landed), [0, 1, 2, 3]);
    assert_eq!((scheduler.in_flight(PEER_A), scheduler.flights()), ([0; 3], 0));
}

#[test]
fn what_is_elevated_is_not_promoted_to_less() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    want(&mut scheduler, 0, at(A, 0), None, Class::Bulk);
    want(&mut scheduler, 100, at(A, 100), None, Class::Bulk);
    let (bulk, ..) = sends(&mut scheduler)[0];
    // Guests get so much, and go on asking, that bulk is owed its share.
    for waiter in 1..10 {
        want(&mut scheduler, waiter, at(A, waiter), None, Class::Demand);
    }
    let demand: Vec<FlightId> = sends(&mut scheduler).iter().map(|s| s.0).collect();
    for flight in &demand[..4] {
        scheduler.arrived(T0, *flight, 65536);
    }
    let elevated = Action::Promote { flight: bulk, peer: PEER_A, class: Class::Demand };
    assert_eq!(drain(&mut scheduler), [elevated], "that which has waited longest");
    assert_eq!(scheduler.in_flight(PEER_A), [5, 0, 2], "elevated bulk is bulk");
    want(&mut scheduler, 20, at(A, 0), None, Class::Readahead);
    want(&mut scheduler, 21, at(A, 0), None, Class::Demand);
    assert_eq!(drain(&mut scheduler), []);
    assert_eq!(scheduler.in_flight(PEER_A), [6, 0, 1]);
}

#[test]
fn demand_hurries_the_look_up_that_it_joins() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    want(&mut scheduler, 0, at(A, 0), Some(id(1)), Class::Bulk);
    let flight = FlightId(1);
    assert_eq!(drain(&mut scheduler), [Action::LookUp { flight, id: id(1), class: Class::Bulk }]);
    want(&mut scheduler, 1, at(B, 7), Some(id(1)), Class::Demand);
    assert_eq!(drain(&mut scheduler), [Action::LookUp { flight, id: id(1), class: Class::Demand }]);
    assert_eq!(scheduler.joined(), 1);
    assert_eq!(scheduler.looked_up(T0, flight, false), None);
    assert_eq!(sends(&mut scheduler), [(flight, PEER_A, at(A, 0), Class::Demand)]);
    // The first look-up's answer comes late and changes nothing.
    assert_eq!(scheduler.looked_up(T0, flight, true), None);
    assert_eq!(waiters_of(scheduler.arrived(T0, flight, 1)), [0, 1]);
}

#[test]
fn what_the_store_has_is_not_asked_for() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    want(&mut scheduler, 0, at(A, 0), Some(id(1)), Class::Bulk);
    want(&mut scheduler, 1, at(B, 0), Some(id(1)), Class::Bulk);
    assert_eq!(drain(&mut scheduler).len(), 1);
    assert_eq!(waiters_of(scheduler.looked_up(T0, FlightId(1), true)), [0, 1]);
    assert_eq!((drain(&mut scheduler), scheduler.flights()), (vec![], 0));
}

#[test]
fn a_paused_volume_s_block_goes_when_another_wants_it() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    scheduler.set_paused(T0, A, true);
    let flight = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Bulk);
    want_missing(&mut scheduler, 1, at(A, 1), id(2), Class::Bulk);
    assert_eq!(drain(&mut scheduler), []);
    want(&mut scheduler, 2, at(B, 5), Some(id(1)), Class::Bulk);
    assert_eq!(sends(&mut scheduler), [(flight, PEER_A, at(B, 5), Class::Bulk)], "through the volume that goes on");
    assert_eq!(waiters_of(scheduler.arrived(T0, flight, 65536)), [0, 2]);
    assert_eq!(drain(&mut scheduler), []);
    scheduler.set_paused(T0, A, false);
    assert_eq!(sends(&mut scheduler).len(), 1);
}

#[test]
fn a_limited_volume_does_not_pay_for_what_another_asks() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    scheduler.set_rate(T0, A, Some(1_000_000));
    scheduler.peer_down(T0, PEER_A);
    for block in 0..100 {
        want_missing(&mut scheduler, block, at(A, block), id(block as u8 + 1), Class::Bulk);
        want(&mut scheduler, 1000 + block, at(B, block), Some(id(block as u8 + 1)), Class::Bulk);
    }
    scheduler.peer_up(T0, PEER_A);
    let sent = sends(&mut scheduler);
    assert!(sent.len() == 100 && sent.iter().all(|s| s.2.volume == B), "{sent:?}");
    sent.iter().for_each(|s| drop(scheduler.arrived(T0, s.0, 65536)));
    want_missing(&mut scheduler, 2000, at(A, 200), id(200), Class::Bulk);
    let token_at = scheduler.deadline().expect("it waits for its token");
    assert!(token_at <= T0 + Duration::from_millis(1), "{token_at:?}");
    scheduler.tick(token_at);
    assert_eq!(sends(&mut scheduler).len(), 1);
}

/// A bound on bulk: of volume A, or of all together.
type Limit = fn(&mut Scheduler, Now, Option<u64>);

const BOTH_LIMITS: [Limit; 2] = [|s, now, rate| s.set_rate(now, A, rate), |s, now, rate| s.set_site_rate(now, rate)];

#[test]
fn guests_do_not_use_up_the_rate_of_bulk() {
    for limit in BOTH_LIMITS {
        let mut scheduler = two_volumes(Limits::default(), PEER_A);
        limit(&mut scheduler, T0, Some(1_000_000));
        let now = T0 + Duration::from_millis(1);
        scheduler.tick(now);
        want(&mut scheduler, 0, at(A, 0), None, Class::Bulk);
        scheduler.tick(now);
        let (flight, ..) = sends(&mut scheduler)[0];
        want(&mut scheduler, 1, at(A, 1), None, Class::Bulk);
        assert!(scheduler.deadline().is_some_and(|deadline| deadline > now + Duration::from_millis(10)), "in debt");
        // The guest wants it now: it is demand, and what bulk was charged for it is given back.
        want(&mut scheduler, 2, at(A, 0), None, Class::Demand);
        let actions = drain(&mut scheduler);
        assert_eq!(actions[0], Action::Promote { flight, peer: PEER_A, class: Class::Demand });
        assert!(matches!(actions[1..], [Action::Send { class: Class::Bulk, .. }]), "{actions:?}");
    }
}

#[test]
fn a_limit_counts_what_came_and_not_what_was_expected() {
    for limit in BOTH_LIMITS {
        let mut scheduler = two_volumes(Limits::default(), PEER_A);
        limit(&mut scheduler, T0, Some(1_000_000));
        let now = T0 + Duration::from_millis(1);
        for block in 0..3 {
            want(&mut scheduler, block, at(A, block), None, Class::Bulk);
        }
        scheduler.tick(now);
        let (flight, ..) = sends(&mut scheduler)[0];
        scheduler.arrived(now, flight, 100);
        assert_eq!(sends(&mut scheduler).len(), 1, "it shrank to nearly nothing");
        // Debts of the old limit are not paid at the new one.
        limit(&mut scheduler, now, Some(10_000_000));
        scheduler.tick(now + Duration::from_millis(1));
        assert_eq!(sends(&mut scheduler).len(), 1);
    }
}

#[test]
fn an_idle_limited_volume_saves_nothing_up() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    scheduler.set_rate(T0, A, Some(500_000));
    scheduler.tick(T0 + Duration::from_secs(60));
    for waiter in 0..64 {
        let place = at(A, waiter);
        let bulk = WantBlock { waiter: WaiterId(waiter), place, id: None, class: Class::Bulk, len_bytes: 65536 };
        scheduler.want(T0 + Duration::from_secs(60), bulk);
    }
    // A tenth of a second's worth, and the block that crosses the line.
    assert_eq!(sends(&mut scheduler).len(), 50_000 / 32_768 + 1);
}

#[test]
fn a_peer_that_comes_back_is_asked_only_for_what_had_not_arrived() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    for block in 0..6 {
        let class = if block % 2 == 0 { Class::Demand } else { Class::Bulk };
        want(&mut scheduler, block, at(A, block), None, class);
    }
    let sent = sends(&mut scheduler);
    assert_eq!(sent.len(), 6);
    for s in &sent[..3] {
        assert!(scheduler.arrived(T0, s.0, 65536).is_some());
    }
    scheduler.peer_down(T0, PEER_A);
    assert_eq!((drain(&mut scheduler), scheduler.in_flight(PEER_A)), (vec![], [0; 3]));
    assert_eq!(scheduler.arrived(T0, sent[4].0, 65536), None, "of the connection that is gone");
    scheduler.peer_up(T0, PEER_A);
    let again: Vec<(u64, Class)> = sends(&mut scheduler).iter().map(|s| (s.2.block.0, s.3)).collect();
    assert_eq!(again, [(4, Class::Demand), (3, Class::Bulk), (5, Class::Bulk)]);
}

#[test]
fn a_peer_that_goes_leaves_its_flights_to_another_that_has_the_block() {
    let mut scheduler = two_volumes(Limits::default(), PEER_B);
    let flight = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Demand);
    want(&mut scheduler, 1, at(B, 3), Some(id(1)), Class::Bulk);
    assert_eq!(sends(&mut scheduler), [(flight, PEER_A, at(A, 0), Class::Demand)]);
    scheduler.peer_down(T0, PEER_A);
    assert_eq!(sends(&mut scheduler), [(flight, PEER_B, at(B, 3), Class::Demand)]);
}

#[test]
fn a_refusal_falls_through_to_another_volume_s_place() {
    for peer_of_b in [PEER_A, PEER_B] {
        let mut scheduler = two_volumes(Limits::default(), peer_of_b);
        let flight = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Demand);
        want(&mut scheduler, 1, at(B, 3), Some(id(1)), Class::Demand);
        assert_eq!(sends(&mut scheduler), [(flight, PEER_A, at(A, 0), Class::Demand)]);
        assert_eq!(scheduler.failed(T0, flight, Failure::Permanent), None);
        assert_eq!(sends(&mut scheduler), [(flight, peer_of_b, at(B, 3), Class::Demand)]);
        // Whoever asks now where it was refused waits for the other place, too.
        want(&mut scheduler, 2, at(A, 0), None, Class::Demand);
        assert_eq!(waiters_of(scheduler.failed(T0, flight, Failure::Permanent)), [0, 1, 2]);
        assert_eq!((drain(&mut scheduler), scheduler.flights()), (vec![], 0));
    }
}

#[test]
fn a_refused_place_whose_waiter_has_gone_leaves_nothing_behind() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    let first = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Demand);
    want(&mut scheduler, 1, at(B, 0), Some(id(1)), Class::Demand);
    scheduler.failed(T0, first, Failure::Permanent);
    scheduler.cancel(T0, WaiterId(0));
    assert_eq!(waiters_of(scheduler.arrived(T0, first, 65536)), [1]);
    assert!(scheduler.by_place.is_empty(), "{:?}", scheduler.by_place);
    drain(&mut scheduler);
    // What was left made the second of these a flight of its own.
    want_missing(&mut scheduler, 2, at(B, 1), id(1), Class::Demand);
    want(&mut scheduler, 3, at(A, 0), Some(id(1)), Class::Demand);
    assert_eq!((scheduler.flights(), scheduler.joined()), (1, 2));
}

#[test]
fn a_block_that_one_peer_keeps_failing_is_asked_of_another() {
    let mut scheduler = two_volumes(Limits::default(), PEER_B);
    let flight = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Demand);
    want(&mut scheduler, 1, at(B, 3), Some(id(1)), Class::Demand);
    let mut asked: Vec<PeerKey> = sends(&mut scheduler).iter().map(|s| s.1).collect();
    for _ in 0..3 {
        assert_eq!(scheduler.failed(T0, flight, Failure::Transient), None);
        scheduler.tick(scheduler.deadline().expect("a retry"));
        asked.extend(sends(&mut scheduler).iter().map(|s| s.1));
    }
    assert_eq!(asked, [PEER_A, PEER_B, PEER_A, PEER_B]);
    // The next would be A, but A is not there.
    scheduler.peer_down(T0, PEER_A);
    scheduler.failed(T0, flight, Failure::Transient);
    scheduler.tick(T0 + Duration::from_secs(5));
    assert_eq!(sends(&mut scheduler).len(), 1);
}

#[test]
fn retries_back_off_and_demand_does_not_wait_for_those_of_bulk() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    want(&mut scheduler, 0, at(A, 0), None, Class::Bulk);
    let (flight, ..) = sends(&mut scheduler)[0];
    let mut now = T0;
    for delay_ms in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
        scheduler.failed(now, flight, Failure::Transient);
        assert_eq!(scheduler.deadline(), Some(now + Duration::from_millis(delay_ms)));
        scheduler.tick(now + Duration::from_millis(delay_ms - 1));
        assert_eq!(drain(&mut scheduler), []);
        now += Duration::from_millis(delay_ms);
        scheduler.tick(now);
        assert_eq!(sends(&mut scheduler).len(), 1);
    }
    scheduler.failed(now, flight, Failure::Transient);
    want(&mut scheduler, 1, at(A, 0), None, Class::Demand);
    assert_eq!(sends(&mut scheduler), [(flight, PEER_A, at(A, 0), Class::Demand)]);
    assert_eq!(scheduler.deadline(), None);
    scheduler.failed(now, flight, Failure::Transient);
    scheduler.cancel(now, WaiterId(0));
    scheduler.cancel(now, WaiterId(1));
    assert_eq!((scheduler.deadline(), scheduler.flights()), (None, 0));
}

#[test]
fn what_failed_goes_before_what_has_waited_less() {
    let mut scheduler = two_volumes(Limits { demand_flights: 1, ..Limits::default() }, PEER_A);
    for block in 0..3 {
        want(&mut scheduler, block, at(A, block), None, Class::Demand);
    }
    let mut flights: Vec<FlightId> = sends(&mut scheduler).iter().map(|s| s.0).collect();
    scheduler.failed(T0, flights[0], Failure::Transient);
    flights.extend(sends(&mut scheduler).iter().map(|s| s.0));
    scheduler.tick(T0 + Duration::from_secs(5));
    assert_eq!(drain(&mut scheduler), [], "the second is under way");
    scheduler.arrived(T0 + Duration::from_secs(5), flights[1], 65536);
    assert_eq!(sends(&mut scheduler), [(flights[0], PEER_A, at(A, 0), Class::Demand)]);
}

#[test]
fn a_removed_volume_s_flights_go_on_through_the_others() {
    // Also where the waiter of the removed volume had cancelled.
    for has_cancelled in [false, true] {
        let mut scheduler = two_volumes(Limits::default(), PEER_B);
        let flight = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Demand);
        want(&mut scheduler, 1, at(B, 3), Some(id(1)), Class::Demand);
        drain(&mut scheduler);
        if has_cancelled {
            scheduler.cancel(T0, WaiterId(0));
        }
        let dropped = scheduler.remove_volume(T0, A);
        assert_eq!(dropped.len(), usize::from(!has_cancelled));
        let resent = Action::Send { flight, peer: PEER_B, place: at(B, 3), class: Class::Demand };
        assert_eq!(drain(&mut scheduler), [Action::Forget { flight, peer: PEER_A }, resent]);
        assert_eq!(waiters_of(scheduler.failed(T0, flight, Failure::Permanent)), [1]);
        assert_eq!((scheduler.flights(), scheduler.by_place.len()), (0, 0));
    }
}

#[test]
fn who_is_left_with_a_place_that_refused_is_answered() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    let flight = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Demand);
    want(&mut scheduler, 1, at(B, 3), Some(id(1)), Class::Demand);
    scheduler.failed(T0, flight, Failure::Permanent);
    drain(&mut scheduler);
    scheduler.remove_volume(T0, B);
    let resent = Action::Send { flight, peer: PEER_A, place: at(A, 0), class: Class::Demand };
    assert_eq!(drain(&mut scheduler), [Action::Forget { flight, peer: PEER_A }, resent]);
    assert_eq!(waiters_of(scheduler.failed(T0, flight, Failure::Permanent)), [0]);
}

#[test]
fn a_removed_volume_s_refusal_is_forgotten() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    let c = VolumeKey(2);
    scheduler.add_volume(c, PEER_A);
    let flight = want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Demand);
    want(&mut scheduler, 1, at(B, 0), Some(id(1)), Class::Demand);
    want(&mut scheduler, 2, at(c, 0), Some(id(1)), Class::Demand);
    scheduler.failed(T0, flight, Failure::Permanent);
    scheduler.failed(T0, flight, Failure::Permanent);
    scheduler.remove_volume(T0, A);
    scheduler.add_volume(A, PEER_A);
    drain(&mut scheduler);
    // Only B's place is left, which refused. A is another volume now, and nobody wants its block.
    scheduler.remove_volume(T0, c);
    let resent = Action::Send { flight, peer: PEER_A, place: at(B, 0), class: Class::Demand };
    assert_eq!(drain(&mut scheduler), [Action::Forget { flight, peer: PEER_A }, resent]);
    assert_eq!(waiters_of(scheduler.failed(T0, flight, Failure::Permanent)), [1]);
}

#[test]
fn the_last_waiter_s_leaving_is_told_to_the_peer() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    want(&mut scheduler, 0, at(A, 0), None, Class::Bulk);
    want(&mut scheduler, 1, at(A, 0), None, Class::Demand);
    let flight = FlightId(1);
    drain(&mut scheduler);
    scheduler.cancel(T0, WaiterId(0));
    assert_eq!(drain(&mut scheduler), []);
    scheduler.cancel(T0, WaiterId(1));
    scheduler.cancel(T0, WaiterId(1));
    assert_eq!(drain(&mut scheduler), [Action::Forget { flight, peer: PEER_A }]);
    assert_eq!(scheduler.arrived(T0, flight, 65536), None);
    assert_eq!((scheduler.in_flight(PEER_A), scheduler.flights()), ([0; 3], 0));
}

#[test]
fn a_deadline_is_never_one_that_a_tick_cannot_serve() {
    let limits = Limits { bulk_window_bytes: 65536, ..Limits::default() };
    let mut scheduler = two_volumes(limits, PEER_A);
    scheduler.set_rate(T0, A, Some(100_000_000));
    let now = T0 + Duration::from_secs(1);
    scheduler.tick(now);
    // The window is full: nothing goes before something arrives, however many tokens there are.
    want(&mut scheduler, 0, at(A, 0), None, Class::Bulk);
    want(&mut scheduler, 1, at(A, 1), None, Class::Bulk);
    scheduler.tick(now);
    let (flight, ..) = sends(&mut scheduler)[0];
    scheduler.tick(now + Duration::from_secs(1));
    assert_eq!(scheduler.deadline(), None);
    // The limited volume has nothing to send, the other one is paused.
    scheduler.set_paused(now, B, true);
    want(&mut scheduler, 2, at(B, 0), None, Class::Bulk);
    scheduler.cancel(now, WaiterId(1));
    scheduler.arrived(now + Duration::from_secs(2), flight, 65536);
    scheduler.tick(now + Duration::from_secs(2));
    assert_eq!((drain(&mut scheduler), scheduler.deadline()), (vec![], None));
    // Paused and in debt: no token will help.
    scheduler.set_rate(now + Duration::from_secs(2), B, Some(1));
    assert_eq!(scheduler.deadline(), None);
    scheduler.set_paused(now + Duration::from_secs(2), B, false);
    assert!(scheduler.deadline().is_some());
    // Tokens of the volume do not help where the site has none.
    scheduler.set_rate(now + Duration::from_secs(2), B, Some(1_000_000));
    scheduler.set_site_rate(now + Duration::from_secs(2), Some(10));
    let both = scheduler.deadline().expect("it waits for both");
    assert!(both >= now + Duration::from_secs(2) + Duration::from_millis(100), "{both:?}");
}

#[test]
fn a_queue_holds_a_flight_once_however_many_places_lead_to_it() {
    let mut scheduler = two_volumes(Limits::default(), PEER_A);
    scheduler.set_paused(T0, A, true);
    want_missing(&mut scheduler, 0, at(A, 0), id(1), Class::Bulk);
    for block in 1..1000 {
        want(&mut scheduler, block, at(A, block), Some(id(1)), Class::Bulk);
    }
    assert_eq!(scheduler.peers[&PEER_A].queued(), 1);
    scheduler.peer_down(T0, PEER_A);
    scheduler.peer_up(T0, PEER_A);
    assert_eq!(scheduler.peers[&PEER_A].queued(), 1);
}

#[test]
fn queues_do_not_grow_by_what_was_cancelled() {
    let limits = Limits { demand_flights: 1, readahead_flights: 1, ..Limits::default() };
    let mut scheduler = two_volumes(limits, PEER_A);
    scheduler.set_paused(T0, A, true);
    for waiter in 0..20_000 {
        let class = Class::ALL[waiter as usize % 3];
        want(&mut scheduler, waiter, at(A, waiter), None, class);
        // One of each class stays: the window of the urgent ones is full.
        if waiter >= 3 {
            scheduler.cancel(T0, WaiterId(waiter));
        }
    }
    assert_eq!(scheduler.flights(), 3);
    assert!(scheduler.peers[&PEER_A].queued() < 5_000, "{}", scheduler.peers[&PEER_A].queued());
}
