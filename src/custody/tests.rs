//! The task of one volume, in virtual time, with a keeper that does as it is told.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::handover::State;

/// Fails the first so many journal writes; everything else succeeds at once.
#[derive(Default)]
struct Fake {
    failures: AtomicU32,
    journalled: AtomicU32,
    admitted: AtomicU32,
}

impl Keeper for Fake {
    fn facts(&self) -> Facts {
        Facts { has_image: true, ..Facts::default() }
    }
    fn journal<'a>(&'a self, _: &'a Row) -> BoxFuture<'a, Result<(), String>> {
        let left = self.failures.load(Ordering::Relaxed);
        Box::pin(std::future::ready(if left > 0 {
            self.failures.store(left - 1, Ordering::Relaxed);
            Err("the disk fails".into())
        } else {
            self.journalled.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }))
    }
    fn admit(&self) {
        self.admitted.fetch_add(1, Ordering::Relaxed);
    }
    fn bar(&self) {}
    fn prepare(&self) -> BoxFuture<'static, Result<(), No>> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn fence(&self, _: bool) -> BoxFuture<'static, Result<(), No>> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn fill(&self) -> BoxFuture<'static, Result<(), No>> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn ask(&self, _: Name, _: Question) -> BoxFuture<'static, Answer> {
        Box::pin(std::future::pending())
    }
    fn copy(&self) {}
    fn stop_copy(&self) {}
    fn offer(&self) {}
    fn end(&self, _: bool) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_journalled_is_tried_again_however_often_peers_ask() {
    let state = State::Released { to: name("b"), is_completed: false };
    let (machine, first) = Machine::restore(Held::new(Epoch::FIRST, state));
    let fake = Fake { failures: AtomicU32::new(1), ..Fake::default() };
    let (custody, fake) = Custody::start(machine, first, |_| Arc::new(fake));
    let told = tokio::spawn({
        let custody = custody.clone();
        async move { custody.tell(Verb::Reclaim { epoch: Epoch::FIRST, salt: 7 }).await }
    });
    for _ in 0..50 {
        tokio::time::sleep(JOURNAL_AGAIN / 10).await;
        let asked = custody.ask(name("c"), false, Question::Completed { epoch: Epoch::FIRST });
        let _ = tokio::time::timeout(JOURNAL_AGAIN / 20, asked).await;
    }
    assert_eq!(fake.journalled.load(Ordering::Relaxed), 1, "it was tried again within five seconds");
    told.await.expect("ends").expect("is reclaimed");
    assert_eq!(fake.admitted.load(Ordering::Relaxed), 1);
    assert!(custody.view().held.state.is_owner() && !custody.view().is_unsure);
}

#[tokio::test(start_paused = true)]
async fn who_asks_what_has_ended_is_to_ask_again() {
    let state = State::Released { to: name("b"), is_completed: true };
    let (machine, first) = Machine::restore(Held::new(Epoch::FIRST, state));
    let (custody, _) = Custody::start(machine, first, |_| Arc::new(Fake::default()));
    custody.tell(Verb::Remove).await.expect("is removed");
    assert!(custody.view().has_ended);
    let answer = custody.ask(name("b"), true, Question::Completed { epoch: Epoch::FIRST }).await;
    assert!(answer.is_passing(), "what is remembered answers then, and nothing that is said meanwhile: {answer:?}");
}
