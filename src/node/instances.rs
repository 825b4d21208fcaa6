//! Which instance of a site is the one. A state that was copied with its key makes two sites of one name; each contact renews a number, so
//! whichever comes second is told apart. Must not know volumes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::inventory::Inventory;
use super::record::{Instance, RecordError, Records};
use crate::core::ids::{Name, Nonce};
use crate::core::wire::Refusal;
use crate::transport::Link;

/// The link over which each peer's accepted instance came last.
#[derive(Default)]
pub(super) struct Instances {
    seen: Mutex<BTreeMap<Name, Accepted>>,
}

struct Accepted {
    address: Option<SocketAddr>,
    link: Weak<dyn Link>,
}

/// Whether a peer that says which number it was last given, and which it is to have from now on, is the one that was here.
fn is_the_one(noted: Option<Nonce>, last: Nonce, next: Nonce) -> bool {
    // Its answer may have been lost: then it says the same again.
    noted.is_none_or(|noted| noted == last || noted == next)
}

impl Instances {
    /// A peer greets; the number is noted, durably, before it is answered.
    ///
    /// The link that it came over before is closed: if that was a copy of it, or its original, that one has to come again, and is turned
    /// away then. Of two that run, one is served.
    pub(super) fn greet(
        &self,
        records: &Records,
        link: &Arc<dyn Link>,
        last: Nonce,
        next: Nonce,
    ) -> Result<(), (Refusal, String)> {
        let (peer, address) = (link.peer(), link.address());
        let failed = |error: RecordError| (Refusal::Internal, format!("this site cannot note who is here: {error}"));
        let mut seen = self.seen.lock();
        let noted = records.instance_of(peer).map_err(failed)?;
        let text = |address: Option<SocketAddr>| address.map_or("an unknown address".into(), |at| at.to_string());
        if !is_the_one(noted, last, next) {
            let before = seen.get(peer).and_then(|before| before.address);
            tracing::error!(
                %peer, from = text(address), accepted_from = text(before),
                "a second instance with this peer's identity is turned away: its state was copied or restored"
            );
            let why = format!(
                "another instance with the identity of {peer} has been here since, from {}; this one came from {}: stop the \
                 wrong one; if it is the other, `blockferry peer accept {peer}` at this source lets this one in",
                text(before),
                text(address)
            );
            return Err((Refusal::Clone, why));
        }
        if noted != Some(next) {
            records.note_instance_of(peer, Some(next)).map_err(failed)?;
        }
        let before = seen.insert(peer.clone(), Accepted { address, link: Arc::downgrade(link) });
        if let Some(link) = before.as_ref().and_then(|before| before.link.upgrade()) {
            tracing::info!(%peer, from = text(link.address()), now_from = text(address), "a peer connected anew: its earlier connection ends");
            link.close(&format!("the same site connected anew, from {}", text(address)));
        }
        Ok(())
    }
}

/// This site's numbers for one peer that it fetches from.
pub(super) struct OwnInstance {
    node: Weak<Inventory>,
    peer: Name,
    records: Records,
}

impl OwnInstance {
    pub(super) fn new(node: &Arc<Inventory>, peer: &Name) -> Arc<OwnInstance> {
        Arc::new(OwnInstance { node: Arc::downgrade(node), peer: peer.clone(), records: node.records.clone() })
    }

    fn note(&self, is_doubted: bool) -> Result<(), RecordError> {
        let instance = self.records.instance_for(&self.peer)?;
        let next = match is_doubted {
            true => Instance { is_doubted, ..instance },
            false => Instance { last: instance.next, next: Nonce::default(), is_doubted },
        };
        self.records.note_instance_for(&self.peer, &next)
    }
}

impl crate::fetch::Greeting for OwnInstance {
    fn offer(&self) -> Result<(Nonce, Nonce), String> {
        let mut instance = self.records.instance_for(&self.peer).map_err(|error| error.to_string())?;
        if instance.next == Nonce::default() {
            let node = self.node.upgrade().ok_or("the site is shutting down")?;
            instance.next = Nonce(node.draw());
            // Durable before it is said: after a crash the same is said again.
            self.records.note_instance_for(&self.peer, &instance).map_err(|error| error.to_string())?;
        }
        Ok((instance.last, instance.next))
    }

    fn accepted(&self) {
        if let Err(error) = self.note(false) {
            tracing::error!(peer = %self.peer, %error, "that the peer knows this instance could not be noted");
        }
        if let Some(node) = self.node.upgrade() {
            node.doubt(&self.peer, false);
        }
    }

    fn turned_away(&self, why: &str) {
        tracing::error!(peer = %self.peer, why, "another instance with this site's identity is about: volumes that came from this peer take no writes here");
        if let Err(error) = self.note(true) {
            tracing::error!(peer = %self.peer, %error, "that could not be noted");
        }
        if let Some(node) = self.node.upgrade() {
            node.doubt(&self.peer, true);
        }
    }
}

impl Inventory {
    /// Tells every volume that has to do with a peer.
    fn doubt(&self, peer: &Name, is_doubted: bool) {
        let entries: Vec<_> = self.volumes.lock().values().cloned().collect();
        for entry in entries {
            if entry.record().held.is_from(peer) {
                entry.custody().doubt(is_doubted);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::store::MemoryState;
    use crate::transport::{NewLink, memory};

    fn nonce(number: u8) -> Nonce {
        Nonce([number; 16])
    }

    /// A link as this site has it, and what keeps it up.
    fn link_of(peer: &Name) -> (Arc<dyn Link>, NewLink) {
        let (there, here) = memory::pair(peer.clone(), "a".parse().expect("a name"));
        (here.link, there)
    }

    #[tokio::test]
    async fn of_a_site_and_its_copy_that_both_run_one_is_served() {
        let records = Records::new(Arc::new(MemoryState::new()));
        let (instances, peer) = (Instances::default(), "b".parse().expect("a name"));
        let ((original, _one), (copy, _two), (again, _three)) = (link_of(&peer), link_of(&peer), link_of(&peer));
        let greet = |link, last, next| instances.greet(&records, link, last, next);
        greet(&original, Nonce::default(), nonce(1)).expect("the first");
        assert!(original.closed().now_or_never().is_none());
        greet(&copy, nonce(1), nonce(2)).expect("it has all that the original has");
        assert!(original.closed().now_or_never().is_some(), "not both at a time");
        assert!(copy.closed().now_or_never().is_none());
        greet(&again, nonce(1), nonce(3)).expect_err("the original comes again");
        assert!(copy.closed().now_or_never().is_none());
    }

    #[tokio::test]
    async fn what_cannot_be_noted_makes_no_copy_of_anybody() {
        let state = Arc::new(MemoryState::new());
        let records = Records::new(Arc::clone(&state) as Arc<dyn crate::store::State>);
        let (instances, peer) = (Instances::default(), "b".parse().expect("a name"));
        state.fail_with(Some("the disk fails"));
        let (refusal, _) =
            instances.greet(&records, &link_of(&peer).0, Nonce::default(), nonce(1)).expect_err("the disk fails");
        assert_eq!(refusal, Refusal::Internal);
    }

    #[tokio::test]
    async fn whoever_comes_second_with_a_copied_state_is_turned_away() {
        let records = Records::new(Arc::new(MemoryState::new()));
        let (instances, peer) = (Instances::default(), "b".parse().expect("a name"));
        let (link, _there) = link_of(&peer);
        let greet = |last, next| instances.greet(&records, &link, last, next);
        greet(Nonce::default(), nonce(1)).expect("the first");
        greet(Nonce::default(), nonce(1)).expect("its answer was lost");
        greet(nonce(1), nonce(2)).expect("it comes again");
        // The clone was made when `last` was 1; it draws a number of its own.
        let (refusal, why) = greet(nonce(1), nonce(9)).expect_err("a clone");
        assert_eq!(refusal, Refusal::Clone);
        assert!(why.contains("another instance"), "{why}");
        greet(nonce(2), nonce(3)).expect("the original goes on");
        records.note_instance_of(&peer, None).expect("a person decides");
        greet(nonce(1), nonce(9)).expect("whoever comes first");
        greet(nonce(2), nonce(3)).expect_err("now the other one is turned away");
    }
}
