//! Steps of one machine, one after the other; the model test looks at all of them together.

use super::*;
use crate::core::wire::Refusal;

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn owned() -> Machine {
    Machine::restore(Held::new(Epoch(1), State::Owned)).0
}

fn facts() -> Facts {
    Facts { has_image: true, ..Facts::default() }
}

fn ask(machine: &mut Machine, ticket: u32, question: Question) -> Vec<Output> {
    let input = Input::Asked { ticket: Ticket(ticket), peer: name("b"), is_granted: true, question };
    machine.handle(input, &facts())
}

fn journalled(outputs: &[Output]) -> Option<&Held> {
    outputs.iter().find_map(|output| match output {
        Output::Journal(row) => row.held.as_ref(),
        _ => None,
    })
}

#[test]
fn a_hand_over_is_journalled_before_it_is_answered() {
    let mut a = owned();
    let outputs = ask(&mut a, 1, Question::TakeOver { epoch: Epoch(2), take: false });
    let [Output::Prepare(job)] = outputs[..] else { panic!("{outputs:?}") };
    assert!(a.admits(), "guests write while the cache is written back");
    let outputs = a.handle(Input::Prepared(job, Ok(())), &facts());
    let [Output::Bar, Output::Fence { job, is_for_peer: true }] = outputs[..] else { panic!("{outputs:?}") };
    assert!(!a.admits());
    let outputs = a.handle(Input::Fenced(job, Ok(())), &facts());
    let mut released = Held::new(Epoch(2), State::Released { to: name("b"), is_completed: false });
    released.lent.insert(name("b"));
    let row = Row { held: Some(released), left: None, owes: None, is_new_content: false };
    let answer = Reply::Peer(Answer::Done(Epoch(2)));
    assert_eq!(outputs, [Output::Bar, Output::Journal(row), Output::Reply(Ticket(1), answer.clone())]);
    // Its answer was lost.
    let again = ask(&mut a, 2, Question::TakeOver { epoch: Epoch(2), take: false });
    assert_eq!(again, [Output::Reply(Ticket(2), answer)]);
}

#[test]
fn a_withdrawal_that_overtakes_its_question_wins() {
    let mut a = owned();
    let outputs = ask(&mut a, 1, Question::GiveBack { epoch: Epoch(2) });
    assert_eq!(journalled(&outputs).map(|held| held.epoch), Some(Epoch(3)));
    let outputs = ask(&mut a, 2, Question::TakeOver { epoch: Epoch(2), take: false });
    assert!(matches!(&outputs[..], [Output::Reply(_, Reply::Peer(Answer::Refused(Some(Epoch(3)), No::Epoch { .. })))]));
    assert!(a.admits());
}

#[test]
fn a_withdrawal_ends_a_hand_over_that_is_under_way() {
    let mut a = owned();
    let outputs = ask(&mut a, 1, Question::TakeOver { epoch: Epoch(2), take: false });
    let [Output::Prepare(job)] = outputs[..] else { panic!("{outputs:?}") };
    let fence = a.handle(Input::Prepared(job, Ok(())), &facts());
    let [_, Output::Fence { job, .. }] = fence[..] else { panic!("{fence:?}") };
    let outputs = ask(&mut a, 2, Question::GiveBack { epoch: Epoch(2) });
    assert!(outputs.contains(&Output::Admit), "{outputs:?}");
    assert!(a.handle(Input::Fenced(job, Ok(())), &facts()).is_empty(), "nobody waits for that fence any more");
    assert!(a.admits());
}

#[test]
fn whoever_hangs_up_keeps_no_guest_out() {
    let mut a = owned();
    let outputs = ask(&mut a, 1, Question::TakeOver { epoch: Epoch(2), take: false });
    let [Output::Prepare(job)] = outputs[..] else { panic!("{outputs:?}") };
    a.handle(Input::Prepared(job, Ok(())), &facts());
    assert_eq!(a.handle(Input::Hung(Ticket(1)), &facts()), [Output::Admit]);
    assert_eq!(a.held().state, State::Owned);
}

#[test]
fn clients_at_the_source_are_not_robbed_without_a_word() {
    let mut a = owned();
    let in_use = Facts { clients: 1, ..facts() };
    let question = |take| Input::Asked {
        ticket: Ticket(1),
        peer: name("b"),
        is_granted: true,
        question: Question::TakeOver { epoch: Epoch(2), take },
    };
    let outputs = a.handle(question(false), &in_use);
    assert!(matches!(&outputs[..], [Output::Reply(_, Reply::Peer(Answer::Refused(_, No::InUse(1))))]));
    assert!(matches!(a.handle(question(true), &in_use)[..], [Output::Prepare(_)]));
}

#[test]
fn what_is_not_journalled_keeps_guests_out_until_it_is() {
    let mut a = owned();
    let outputs = ask(&mut a, 1, Question::GiveBack { epoch: Epoch(2) });
    let Some(Output::Journal(row)) = outputs.first().cloned() else { panic!("{outputs:?}") };
    assert_eq!(a.not_journalled(row, outputs[1..].to_vec()), [Output::Bar]);
    assert!(!a.admits());
    let refused = ask(&mut a, 2, Question::TakeOver { epoch: Epoch(4), take: false });
    assert!(matches!(&refused[..], [Output::Reply(Ticket(2), Reply::Peer(Answer::Refused(_, No::Journal(_))))]));
    let again = a.handle(Input::Tick, &facts());
    assert_eq!(again, outputs);
    assert!(a.admits());
}

fn arriving() -> (Machine, Vec<Output>) {
    let came = Some(Came { from: name("a"), epoch: Epoch(2) });
    Machine::restore(Held { came, ..Held::new(Epoch(2), State::Arriving { from: name("a") }) })
}

#[test]
fn what_arrived_is_owed_to_the_source_and_can_still_be_given_back() {
    let (mut b, _) = arriving();
    let outputs = b.handle(Input::Arrived, &facts());
    let Some(Output::Journal(row)) = outputs.first() else { panic!("{outputs:?}") };
    assert_eq!(row.owes, Some(Debt { peer: name("a"), what: Owed::Completed, epoch: Epoch(2) }));
    let outputs = b.handle(Input::Told(Ticket(5), Verb::Cancel { discard: false }), &facts());
    let [Output::Bar, Output::Fence { job, is_for_peer: false }] = outputs[..] else { panic!("{outputs:?}") };
    let outputs = b.handle(Input::Fenced(job, Err(No::Failed(Refusal::Internal, "no disk".into()))), &facts());
    let Some(Output::Ask { job, question: Question::GiveBack { epoch: Epoch(2) }, .. }) = outputs.last() else {
        panic!("{outputs:?}")
    };
    // The source has removed its image: this site is the owner still.
    let outputs = b.handle(Input::Answered(*job, Answer::Refused(Some(Epoch(2)), No::Unknown)), &facts());
    assert!(outputs.contains(&Output::Admit));
    assert!(outputs.contains(&Output::Reply(Ticket(5), Reply::No(No::Unknown))));
}

#[test]
fn writes_are_thrown_away_only_if_somebody_says_so() {
    let (mut b, _) = arriving();
    let written = Facts { is_written: true, written_bytes: 4096, ..facts() };
    let outputs = b.handle(Input::Told(Ticket(5), Verb::Cancel { discard: false }), &written);
    assert_eq!(outputs, [Output::Reply(Ticket(5), Reply::No(No::Written(4096)))]);
    let outputs = b.handle(Input::Told(Ticket(6), Verb::Cancel { discard: true }), &written);
    assert!(matches!(outputs[..], [Output::Bar, Output::Fence { .. }]));
    // A write that was under way when the fence was shut counts.
    let (mut b, _) = arriving();
    let outputs = b.handle(Input::Told(Ticket(5), Verb::Cancel { discard: false }), &facts());
    let [_, Output::Fence { job, .. }] = outputs[..] else { panic!("{outputs:?}") };
    let outputs = b.handle(Input::Fenced(job, Ok(())), &written);
    assert_eq!(outputs, [Output::Admit, Output::Reply(Ticket(5), Reply::No(No::Written(4096)))]);
}

#[test]
fn a_reclaimed_volume_is_fenced_where_it_was() {
    let (mut a, _) = Machine::restore(Held::new(Epoch(2), State::Released { to: name("b"), is_completed: false }));
    assert!(matches!(
        a.handle(Input::Told(Ticket(1), Verb::Reclaim { epoch: Epoch(1), salt: 0 }), &facts())[..],
        [Output::Reply(_, Reply::No(No::NotThisEpoch(Epoch(2))))]
    ));
    a.handle(Input::Told(Ticket(1), Verb::Reclaim { epoch: Epoch(2), salt: 0 }), &facts());
    assert!(a.admits());
    let (mut b, _) = arriving();
    let outputs = b.handle(Input::Heard(name("a"), a.held().epoch), &facts());
    assert!(matches!(outputs[..], [Output::StopCopy, Output::Bar, Output::Journal(_)]), "{outputs:?}");
    assert!(!b.admits());
    assert!(matches!(b.held().state, State::Fenced { .. }));
}

#[test]
fn nobody_but_the_origin_can_take_a_volume_away() {
    let mut a = owned();
    let outputs = ask(&mut a, 1, Question::Reclaimed { epoch: Epoch(1).reclaimed(0) });
    assert!(matches!(&outputs[..], [Output::Reply(_, Reply::Peer(Answer::Refused(..)))]));
    assert!(a.admits());
}

fn hand_over(machine: &mut Machine, epoch: Epoch) {
    let outputs = ask(machine, 1, Question::TakeOver { epoch, take: false });
    let [Output::Prepare(job)] = outputs[..] else { panic!("{outputs:?}") };
    let outputs = machine.handle(Input::Prepared(job, Ok(())), &facts());
    let [_, Output::Fence { job, .. }] = outputs[..] else { panic!("{outputs:?}") };
    machine.handle(Input::Fenced(job, Ok(())), &facts());
    assert_eq!(machine.held().epoch, epoch);
}

fn reclaim(machine: &mut Machine, salt: u16) {
    let epoch = machine.held().epoch;
    machine.handle(Input::Told(Ticket(9), Verb::Reclaim { epoch, salt }), &facts());
    assert!(machine.admits());
}

#[test]
fn a_person_at_a_site_that_got_the_volume_is_believed() {
    // a reclaimed what it had let go of to b; now a person reclaims at b.
    let mut a = owned();
    hand_over(&mut a, Epoch(2));
    reclaim(&mut a, 0);
    let again = a.held().epoch.reclaimed(0);
    let outputs = ask(&mut a, 2, Question::Reclaimed { epoch: again });
    assert!(!a.admits(), "{outputs:?}");
    assert!(matches!(&a.held().state, State::Fenced { by, .. } if *by == name("b")));
    // And after a took the volume back, which b did not hear.
    let mut a = owned();
    hand_over(&mut a, Epoch(2));
    ask(&mut a, 2, Question::GiveBack { epoch: Epoch(2) });
    assert!(a.admits());
    ask(&mut a, 3, Question::Reclaimed { epoch: Epoch(2).reclaimed(0) });
    assert!(!a.admits());
}

#[test]
fn of_two_persons_in_one_term_one_wins() {
    let both = |at_a, at_b| {
        let mut a = owned();
        hand_over(&mut a, Epoch(2));
        reclaim(&mut a, at_a);
        let at_b = Epoch(2).reclaimed(at_b);
        let outputs = ask(&mut a, 2, Question::Reclaimed { epoch: at_b });
        let Some(Output::Reply(_, Reply::Peer(answer))) = outputs.last().cloned() else { panic!("{outputs:?}") };
        let debt = Debt { peer: name("a"), what: Owed::Reclaimed, epoch: at_b };
        (a.admits(), outcome(&debt, &answer))
    };
    assert_eq!(both(1, 2), (false, Outcome::Settled));
    assert_eq!(both(2, 1), (true, Outcome::Overruled(Epoch(2).reclaimed(2))), "b is to hear of it");
}

#[test]
fn whoever_is_believed_to_own_it_hears_of_a_later_decision() {
    let (a, b, c) = (name("a"), name("b"), name("c"));
    let mut held = Held::new(Epoch(3).reclaimed(0), State::Fenced { by: a.clone(), is_complete: true });
    held.lent.extend([a.clone(), b]);
    let (mut machine, _) = Machine::restore(held);
    let again = machine.held().epoch.reclaimed(0);
    let outputs = ask(&mut machine, 1, Question::Reclaimed { epoch: again });
    let row = outputs.iter().find_map(|output| match output {
        Output::Journal(row) => Some(row),
        _ => None,
    });
    assert_eq!(row.and_then(|row| row.owes.clone()), Some(Debt { peer: a, what: Owed::Reclaimed, epoch: again }));
    assert!(!machine.held().knows(&c));
}

#[test]
fn a_decision_is_passed_on_by_a_site_that_has_the_volume_no_more() {
    let (a, b, c) = (name("a"), name("b"), name("c"));
    let left = Left { to: Some(c.clone()), epoch: Epoch(3), known: [a.clone()].into() };
    let epoch = Epoch(2).reclaimed(0);
    let (answer, noted) = without_volume(&a, &Question::Reclaimed { epoch }, Some(&left));
    assert_eq!(answer, Answer::Done(epoch));
    let owes = Debt { peer: c.clone(), what: Owed::Reclaimed, epoch };
    let after = Left { to: Some(a.clone()), epoch, known: [c.clone()].into() };
    assert_eq!(noted, Some((after.clone(), Some(owes))));
    // Once more, and from somebody who has nothing to do with it.
    assert_eq!(without_volume(&a, &Question::Reclaimed { epoch }, Some(&after)).1, None);
    assert_eq!(without_volume(&b, &Question::Reclaimed { epoch }, Some(&left)).1, None);
    // c decided, too, but its decision does not win: it is to hear that.
    let (answer, noted) =
        without_volume(&c, &Question::Reclaimed { epoch }, Some(&Left { epoch: epoch.reclaimed(0), ..after }));
    assert!(matches!(answer, Answer::Refused(Some(_), No::Reclaimed { .. })), "{answer:?}");
    assert_eq!(noted, None);
}

#[test]
fn a_site_that_asks_again_passes_on_what_it_skipped() {
    let (a, c) = (name("a"), name("c"));
    let released = Held::new(Epoch(3), State::Released { to: c.clone(), is_completed: true });
    let at = Epoch(2).reclaimed(0);
    let (held, owes) = asking(&a, at, Some(&released), None).expect("it is ahead");
    assert_eq!((held.epoch, held.knows(&c)), (at.next(), true));
    assert_eq!(owes, Some(Debt { peer: c.clone(), what: Owed::Reclaimed, epoch: at }));
    assert_eq!(asking(&c, Epoch(3), Some(&released), None).map(|(_, owes)| owes), Ok(None));
    assert!(matches!(asking(&a, Epoch(2), Some(&released), None), Err(No::Epoch { .. })), "an old copy");
    let left = Left { to: None, epoch: Epoch(9), known: [].into() };
    assert!(asking(&a, Epoch(8), None, Some(&left)).is_err(), "what left here is ahead");
}
