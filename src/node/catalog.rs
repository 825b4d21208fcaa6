//! What peers may have of this site's volumes. Who owns what is the machines' business. Must not know connections.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::entry::Entry;
use super::inventory::Inventory;
use crate::core::ids::{Name, Nonce};
use crate::core::wire::Refusal;
use crate::handover::{Answer, No, Question, State, without_volume};
use crate::source::{Catalog, Offered, Refused, SourceVolume};
use crate::transport::Link;

impl Catalog for Inventory {
    fn open(&self, peer: &Name, volume: &Name) -> Result<Offered, Refused> {
        let is_granted = self.is_granted(peer, volume);
        let unknown = || {
            let why = format!(
                "there is no volume {volume} for this peer: check the name, and `volumes` in the [[peers]] entry at {}",
                self.site
            );
            (Refusal::UnknownVolume, 0, why)
        };
        let Some(entry) = self.entry(volume) else { return Err(unknown()) };
        // Before the record: what is taken back behind this look is opened in vain.
        let opening = entry.source.lock().as_ref().map(SourceVolume::open);
        let record = entry.record();
        let epoch = record.held.epoch.0;
        let is_theirs = matches!(&record.held.state, State::Released { to, .. } if to == peer);
        if !is_granted && !is_theirs {
            tracing::warn!(%volume, %peer, "a peer asked for a volume that it was not granted; see `volumes` of its [[peers]] entry");
            return Err(unknown());
        }
        if let Some(no) = record.held.state.withholds_from(peer) {
            return Err((no.refusal(), epoch, format!("volume {volume}: {no}")));
        }
        if let Err(why) = entry.volume() {
            tracing::warn!(%volume, %peer, why, "a peer asked for a volume whose image cannot be opened");
            let why = format!("the image of volume {volume} cannot be opened at {}", self.site);
            return Err((Refusal::Busy, epoch, why));
        }
        let opening =
            opening.ok_or_else(|| (Refusal::Busy, epoch, format!("volume {volume} is being prepared; try again")))?;
        if opening.generation != record.generation.0 {
            // It has just changed hands, and what peers fetch from is about to.
            return Err((Refusal::Busy, epoch, format!("volume {volume} is being prepared; try again")));
        }
        Ok(Offered { opening, epoch, is_read_only: self.is_read_only(&entry).is_some() })
    }

    fn ask(&self, peer: &Name, volume: &Name, question: Question) -> BoxFuture<'static, Answer> {
        let is_granted = self.is_granted(peer, volume);
        self.has_heard(peer, volume, &question);
        match self.entry(volume) {
            Some(entry) => entry.custody().ask(peer.clone(), is_granted, question).boxed(),
            None => {
                let answer = self.ask_without_volume(peer, volume, &question);
                std::future::ready(answer).boxed()
            }
        }
    }

    fn greet(&self, link: &Arc<dyn Link>, last: Nonce, next: Nonce) -> Result<(), (Refusal, String)> {
        self.instances.greet(&self.records, link, last, next)
    }
}

impl Inventory {
    /// A question about a volume that is not here. What comes of it is durable before the answer.
    pub(super) fn ask_without_volume(&self, peer: &Name, volume: &Name, question: &Question) -> Answer {
        // What is about to be here under the name was made of what is remembered, and must not miss what is noted beside it.
        let reserved = self.reserved.lock();
        if reserved.contains(volume) || self.entry(volume).is_some() {
            return Answer::Refused(None, No::Preparing);
        }
        let noted = self.records.left(volume).and_then(|left| {
            let (answer, noted) = without_volume(peer, question, left.as_ref());
            if let Some((left, owes)) = noted {
                self.records.note_left(volume, &left, owes.as_ref())?;
                self.debts.wake();
            }
            Ok(answer)
        });
        noted.unwrap_or_else(|error| Answer::Refused(None, No::Journal(error.to_string())))
    }

    fn is_granted(&self, peer: &Name, volume: &Name) -> bool {
        self.outside().is_some_and(|outside| outside.is_granted(peer, volume))
    }

    /// Why guests may only read a volume, if that is so.
    pub(super) fn is_read_only(&self, entry: &Arc<Entry>) -> Option<String> {
        if entry.record().is_read_only {
            return Some("it was read-only at its source".into());
        }
        let volume = entry.volume().ok()?;
        let image = volume.image();
        (!image.is_writable()).then(|| {
            let why = image.read_only_why().unwrap_or("its image was opened for reading");
            format!("image {}: {why}", image.path().display())
        })
    }
}
