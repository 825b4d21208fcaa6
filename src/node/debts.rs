//! What peers are owed: told again and again until they answer, whatever becomes of the volumes here. Must not know volumes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::inventory::Inventory;
use crate::core::ids::Name;
use crate::handover::{Answer, Debt, Epoch, No, Outcome, Owed, Question, outcome};

/// The least and the longest pause between two attempts to tell a peer.
const TELL_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];
/// Of a peer that does not answer at all.
const PATIENCE: Duration = Duration::from_secs(12);

/// What is owed, as the journal has it, and whether somebody sees to it.
#[derive(Default)]
pub(super) struct Debts {
    open: Mutex<BTreeMap<(Name, Debt), bool>>,
    news: Notify,
}

impl Debts {
    /// A debt was journalled.
    pub(super) fn wake(&self) {
        self.news.notify_one();
    }

    /// What is owed now, of one volume or of all.
    pub(super) fn list(&self, of: Option<&Name>) -> Vec<(Name, Debt)> {
        let open = self.open.lock();
        open.keys().filter(|(name, _)| of.is_none_or(|of| of == name)).cloned().collect()
    }
}

impl Inventory {
    /// Reads what is owed, and sees to it for as long as the site runs.
    pub(super) async fn pay_debts(self: Arc<Self>) {
        loop {
            if let Err(error) = self.read_debts() {
                tracing::error!(%error, "what peers are owed cannot be read");
                tokio::time::sleep(TELL_AGAIN[1]).await;
                continue;
            }
            let new: Vec<(Name, Debt)> = {
                let mut open = self.debts.open.lock();
                let new = open.iter_mut().filter(|(_, is_seen_to)| !**is_seen_to);
                new.map(|(debt, is_seen_to)| {
                    *is_seen_to = true;
                    debt.clone()
                })
                .collect()
            };
            for (name, debt) in new {
                let node = Arc::clone(&self);
                tokio::spawn(async move { node.pay(name, debt).await });
            }
            self.debts.news.notified().await;
        }
    }

    /// Takes note of what the journal has.
    pub(super) fn read_debts(&self) -> Result<(), super::record::RecordError> {
        let debts = self.records.debts()?;
        let mut open = self.debts.open.lock();
        for debt in debts {
            open.entry(debt).or_insert(false);
        }
        Ok(())
    }

    /// A peer shows by its question that it knows.
    pub(super) fn has_heard(&self, peer: &Name, volume: &Name, question: &Question) {
        let Question::Reclaimed { epoch } = question else { return };
        for (name, debt) in self.debts.list(Some(volume)) {
            if debt.peer == *peer && debt.what == Owed::Reclaimed && debt.epoch <= *epoch {
                self.settle(&name, &debt);
            }
        }
    }

    fn settle(&self, name: &Name, debt: &Debt) -> bool {
        if let Err(error) = self.records.settle(name, debt) {
            tracing::error!(volume = %name, %error, "that a peer was told could not be noted");
            return false;
        }
        self.debts.open.lock().remove(&(name.clone(), debt.clone()));
        tracing::info!(volume = %name, peer = %debt.peer, owed = ?debt.what, "a peer knows");
        true
    }

    /// A decision at the peer wins. False: what comes of it is not noted yet, durably.
    async fn hears(&self, name: &Name, debt: &Debt, epoch: Epoch) -> bool {
        match self.entry(name) {
            Some(entry) => {
                let custody = entry.custody();
                custody.heard(debt.peer.clone(), epoch);
                custody.settled().await;
                let view = custody.view();
                // If it has ended meanwhile, what is remembered of it is to hear of it.
                !view.has_ended && !view.is_unsure && !epoch.overrules(view.held.epoch)
            }
            None => {
                let answer = self.ask_without_volume(&debt.peer, name, &Question::Reclaimed { epoch });
                !matches!(answer, Answer::Refused(_, No::Journal(_) | No::Preparing))
            }
        }
    }

    fn is_open(&self, name: &Name, debt: &Debt) -> bool {
        self.debts.open.lock().contains_key(&(name.clone(), debt.clone()))
    }

    async fn pay(self: Arc<Self>, name: Name, debt: Debt) {
        let question = match debt.what {
            Owed::Completed => Question::Completed { epoch: debt.epoch },
            Owed::Reclaimed => Question::Reclaimed { epoch: debt.epoch },
        };
        let mut pause = TELL_AGAIN[0];
        while self.is_open(&name, &debt) {
            let asked = tokio::time::timeout(PATIENCE, self.ask_peer(&debt.peer, &name, &question)).await;
            match asked.ok().flatten().map(|answer| (outcome(&debt, &answer), answer)) {
                Some((Outcome::Settled, _)) => break,
                Some((Outcome::Overruled(epoch), _)) if self.hears(&name, &debt, epoch).await => break,
                Some((Outcome::Overruled(_), _)) => {}
                Some((Outcome::Again, answer)) => {
                    tracing::warn!(volume = %name, peer = %debt.peer, owed = ?debt.what, ?answer, "a peer is yet to be told");
                }
                None => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(TELL_AGAIN[1]);
        }
        while self.is_open(&name, &debt) && !self.settle(&name, &debt) {
            tokio::time::sleep(TELL_AGAIN[1]).await;
        }
    }
}
