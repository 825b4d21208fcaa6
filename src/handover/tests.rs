//! Steps of one machine, one after the other; the model test looks at all of them together.

use super::*;
use crate::core::wire::Refusal;

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn owned() -> Machine {
    Machine::restore(Held { epoch: Epoch(1), state: State::Owned, came: None }).0
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
    let released = Held { epoch: Epoch(2), state: State::Released { to: name("b"), is_completed: false }, came: None };
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
    let held = Held {
        epoch: Epoch(2),
        state: State::Arriving { from: name("a") },
        came: Some(Came { from: name("a"), epoch: Epoch(2) }),
    };
    Machine::restore(held)
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
    let (mut a, _) = Machine::restore(Held {
        epoch: Epoch(2),
        state: State::Released { to: name("b"), is_completed: false },
        came: None,
    });
    assert!(matches!(
        a.handle(Input::Told(Ticket(1), Verb::Reclaim { epoch: Epoch(1) }), &facts())[..],
        [Output::Reply(_, Reply::No(No::NotThisEpoch(Epoch(2))))]
    ));
    a.handle(Input::Told(Ticket(1), Verb::Reclaim { epoch: Epoch(2) }), &facts());
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
    let outputs = ask(&mut a, 1, Question::Reclaimed { epoch: Epoch(1).reclaimed() });
    assert!(matches!(&outputs[..], [Output::Reply(_, Reply::Peer(Answer::Refused(..)))]));
    assert!(a.admits());
}
