//! Listens on the wire: what is asked for needlessly often, what exceeds the bounds; and makes the source lie now and then.
//! Must not know what becomes of blocks.

use std::collections::{BTreeMap, BTreeSet};

use blockferry::core::frame::Frame;
use blockferry::core::ids::{BlockId, BlockIndex, Class};
use blockferry::core::wire::{Control, Data};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::world::{Shared, Side};

/// Flights that the destinations of this simulation may have with a peer: demand, readahead.
pub const DEMAND_FLIGHTS: usize = 6;
pub const READAHEAD_FLIGHTS: usize = 3;
/// What was answered so long ago is in the store or the file by now, and a page that came so long ago is known.
const SETTLED_MS: u64 = 1000;

/// See the module.
pub struct Wiretap {
    world: Shared,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Of the present connection: what is asked for and not yet answered.
    open: BTreeMap<u64, Asked>,
    /// Handles of the present connection whose page has come, and since when.
    paged: BTreeMap<u32, u64>,
    page_flights: BTreeMap<u64, u32>,
    /// Nonzero ids that have come, and when they last did.
    came: BTreeMap<BlockId, u64>,
    asked: u64,
    lost: u64,
    distinct: BTreeSet<BlockId>,
    last_frame: Option<Frame>,
}

struct Asked {
    class: Class,
    handle: u32,
    block: BlockIndex,
    at_ms: u64,
    is_page_known: bool,
}

/// Totals of one world.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub asked: u64,
    pub lost: u64,
    pub distinct: u64,
}

impl Wiretap {
    pub fn new(world: &Shared) -> Wiretap {
        Wiretap { world: world.clone(), inner: Mutex::default() }
    }

    pub fn connected(&self) {
        let mut inner = self.inner.lock();
        inner.open.clear();
        inner.paged.clear();
        inner.page_flights.clear();
    }

    /// The connection is gone, and with it what was under way.
    pub fn lost(&self) {
        let mut inner = self.inner.lock();
        inner.lost += inner.open.len() as u64;
        inner.open.clear();
    }

    pub fn tally(&self) -> Tally {
        let inner = self.inner.lock();
        Tally { asked: inner.asked, lost: inner.lost, distinct: inner.distinct.len() as u64 }
    }

    pub fn control(&self, from: Side, frame: &Bytes) {
        if from == Side::Source {
            return;
        }
        let Ok(frame) = Control::decode(frame.clone()) else {
            return self.world.fail("protocol", "the destination sent a frame that makes no sense".into());
        };
        let now_ms = self.world.now_ms();
        let mut inner = self.inner.lock();
        match frame {
            Control::Wants(wants) => {
                for want in wants {
                    inner.asked += 1;
                    let again = inner.open.values().find(|open| (open.handle, open.block) == (want.handle, want.block));
                    if again.is_some() {
                        self.world.fail(
                            "fetched twice",
                            format!("block {} is asked for while it is under way", want.block.0),
                        );
                    }
                    let since_ms = inner.paged.get(&want.handle);
                    let is_page_known = since_ms.is_some_and(|since_ms| since_ms + SETTLED_MS < now_ms);
                    let asked = Asked {
                        class: want.class,
                        handle: want.handle,
                        block: want.block,
                        at_ms: now_ms,
                        is_page_known,
                    };
                    inner.open.insert(want.flight, asked);
                    self.world.note("want", [want.flight, want.block.0, want.class as u64]);
                }
                for (class, most) in [(Class::Demand, DEMAND_FLIGHTS), (Class::Readahead, READAHEAD_FLIGHTS)] {
                    let open = inner.open.values().filter(|open| open.class == class).count();
                    if open > most {
                        self.world.fail("bounds", format!("{open} wants are open as {class:?}, {most} may be"));
                    }
                }
            }
            Control::Forget { flight } => {
                inner.lost += u64::from(inner.open.remove(&flight).is_some());
            }
            // A promotion is bound by no window: what it was sent as counts, and that place is free again.
            Control::Promote { flight, .. } => {
                if let Some(open) = inner.open.get_mut(&flight) {
                    open.class = Class::Bulk;
                }
            }
            Control::Page { flight, handle, .. } => {
                inner.page_flights.insert(flight, handle);
            }
            _ => {}
        }
    }

    /// A message that is about to be delivered, as it is to be delivered.
    pub fn data(&self, from: Side, message: Bytes) -> Bytes {
        if from == Side::Destination {
            return message;
        }
        let now_ms = self.world.now_ms();
        let lies_percent = self.world.weather.lock().lies_percent;
        let Ok(data) = Data::decode(message.clone()) else {
            self.world.fail("protocol", "the source sent a message that makes no sense".into());
            return message;
        };
        let mut inner = self.inner.lock();
        match data {
            Data::Block { flight, id, frame } => {
                if let Some(frame) = &frame
                    && self.world.percent(lies_percent)
                {
                    self.world.note("lie", [flight, 0, 0]);
                    let is_other = |other: &Frame| other != frame && other.raw_len_bytes == frame.raw_len_bytes;
                    let frame = inner.last_frame.clone().filter(is_other).unwrap_or_else(|| flipped(frame));
                    inner.lost += 1;
                    // Asked for again under the same number.
                    inner.open.remove(&flight);
                    return Data::Block { flight, id, frame: Some(frame) }.encode().concat().into();
                }
                let asked = inner.open.remove(&flight);
                if id.is_zero() {
                    return message;
                }
                inner.last_frame = frame;
                inner.distinct.insert(id);
                if let (Some(asked), Some(came_ms)) = (asked, inner.came.get(&id))
                    && asked.is_page_known
                    && came_ms + SETTLED_MS < asked.at_ms
                    && self.world.is_quiet
                {
                    self.world.fail(
                        "fetched twice",
                        format!("block {} came {} ms before it was asked for", asked.block.0, asked.at_ms - came_ms),
                    );
                }
                inner.came.insert(id, now_ms);
            }
            Data::Failed { flight, .. } => {
                inner.open.remove(&flight);
                inner.lost += 1;
            }
            Data::Page { flight, .. } => {
                if let Some(handle) = inner.page_flights.remove(&flight) {
                    inner.paged.entry(handle).or_insert(now_ms);
                }
            }
            Data::Roots { .. } => {}
        }
        message
    }
}

/// The same frame with a bit of its payload changed.
fn flipped(frame: &Frame) -> Frame {
    let mut payload = frame.payload.to_vec();
    if let Some(byte) = payload.last_mut() {
        *byte ^= 0x10;
    }
    Frame { payload: payload.into(), ..frame.clone() }
}
