//! Replies on their way out: small ones and synchronous reads side by side in reused pages, large data as it came. Must
//! not know what the bytes mean.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;

use crate::pipe::Pipe;

/// The longest read that is served synchronously, into a page.
pub(super) const SYNC_MAX_BYTES: usize = 128 << 10;

/// Bytes of a page: the longest synchronous read, its header, and room for a few replies.
const PAGE_BYTES: usize = SYNC_MAX_BYTES + (4 << 10);

/// Pages that are kept for later.
const SPARE_PAGES: usize = 2;

/// Bytes of a page that begins with a small reply.
const SMALL_PAGE_BYTES: usize = 4 << 10;

/// The longest reply that such a page is made for.
const SMALL_BYTES: usize = 512;

/// Pieces below this are copied into a page: cheaper than a segment of their own, and a page for the next header behind it.
const COPY_BELOW_BYTES: usize = 16 << 10;

/// The most segments that are offered to one system call.
pub(super) const MAX_SLICES: usize = 64;

enum Segment {
    /// A page; the bytes from `start` to `end` wait.
    Page { page: Box<[u8]>, start: usize, end: usize },
    /// Bytes of somebody else's.
    Shared(Bytes),
    /// All that is in a pipe.
    Piped(Pipe),
}

/// The queue.
#[derive(Default)]
pub(super) struct Output {
    segments: VecDeque<Segment>,
    spare: Vec<Box<[u8]>>,
    /// Pipes that have been sent.
    drained: Vec<Pipe>,
    /// Pipes that wait.
    pipes: usize,
    waiting_bytes: usize,
    /// All bytes ever queued.
    queued_bytes: u64,
    /// All bytes ever sent.
    sent_bytes: u64,
}

impl Output {
    /// Bytes that wait to be sent.
    pub(super) fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    /// The position in the stream behind everything that was queued so far.
    pub(super) fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    /// The position in the stream behind everything that was sent so far.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Room for `len` (at most a page) contiguous bytes at the end, of undefined content. They count when
    /// [`Output::commit`] is called.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let fits = matches!(self.segments.back(), Some(Segment::Page { page, end, .. }) if page.len() - end >= len);
        if !fits {
            let page = if len <= SMALL_BYTES && matches!(self.segments.back(), Some(Segment::Shared(_))) {
                vec![0; SMALL_PAGE_BYTES].into_boxed_slice()
            } else {
                self.spare.pop().unwrap_or_else(|| vec![0; PAGE_BYTES.max(len)].into_boxed_slice())
            };
            self.segments.push_back(Segment::Page { page, start: 0, end: 0 });
        }
        match self.segments.back_mut() {
            Some(Segment::Page { page, end, .. }) => &mut page[*end..*end + len],
            _ => &mut [],
        }
    }

    /// The first `len` bytes of the last [`Output::room`] are to be sent.
    pub(super) fn commit(&mut self, len: usize) {
        if let Some(Segment::Page { end, .. }) = self.segments.back_mut() {
            *end += len;
            self.count(len);
        }
    }

    /// Queues a copy of `bytes`.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(PAGE_BYTES) {
            self.room(part.len()).copy_from_slice(part);
            self.commit(part.len());
        }
    }

    /// Queues `bytes` as they are.
    pub(super) fn put_shared(&mut self, bytes: &Bytes) {
        if bytes.len() < COPY_BELOW_BYTES {
            return self.put(bytes);
        }
        self.segments.push_back(Segment::Shared(bytes.clone()));
        self.count(bytes.len());
    }

    /// Queues what is in `pipe`.
    pub(super) fn put_piped(&mut self, pipe: Pipe) {
        let len = pipe.len_bytes();
        self.segments.push_back(Segment::Piped(pipe));
        self.pipes += 1;
        self.count(len);
    }

    /// How many pipes wait to be sent.
    pub(super) fn pipes(&self) -> usize {
        self.pipes
    }

    /// The pipe that is next to be sent, if it is a pipe: then [`Output::sent_piped`] is told what went.
    pub(super) fn next_pipe(&mut self) -> Option<&mut Pipe> {
        let next = self
            .segments
            .iter_mut()
            .find(|segment| !matches!(segment, Segment::Page { start, end, .. } if start == end))?;
        match next {
            Segment::Piped(pipe) => Some(pipe),
            _ => None,
        }
    }

    /// `len` bytes have been sent out of the next pipe.
    pub(super) fn sent_piped(&mut self, len: usize) {
        self.waiting_bytes -= len;
        self.sent_bytes += len as u64;
        while let Some(segment) = self.segments.pop_front() {
            match segment {
                Segment::Piped(pipe) if pipe.is_empty() => {
                    self.drained.push(pipe);
                    self.pipes -= 1;
                    return;
                }
                Segment::Piped(pipe) => {
                    self.segments.push_front(Segment::Piped(pipe));
                    return;
                }
                other => self.recycle(other),
            }
        }
    }

    /// A pipe that has been sent.
    pub(super) fn drained_pipe(&mut self) -> Option<Pipe> {
        self.drained.pop()
    }

    fn recycle(&mut self, segment: Segment) {
        if let Segment::Page { page, .. } = segment
            && self.spare.len() < SPARE_PAGES
            && page.len() == PAGE_BYTES
        {
            self.spare.push(page);
        }
    }

    fn count(&mut self, len: usize) {
        self.waiting_bytes += len;
        self.queued_bytes += len as u64;
    }

    /// What waits before the next pipe, for one system call; returns how many of `slices` are filled.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; MAX_SLICES]) -> usize {
        let mut count = 0;
        for segment in &self.segments {
            let bytes = match segment {
                Segment::Page { page, start, end } => &page[*start..*end],
                Segment::Shared(bytes) => &bytes[..],
                Segment::Piped(_) => break,
            };
            if bytes.is_empty() {
                continue;
            }
            if count == MAX_SLICES {
                break;
            }
            slices[count] = IoSlice::new(bytes);
            count += 1;
        }
        count
    }

    /// The first `len` bytes have been sent.
    pub(super) fn sent(&mut self, mut len: usize) {
        self.waiting_bytes -= len;
        self.sent_bytes += len as u64;
        while let Some(segment) = self.segments.front_mut() {
            let there = match segment {
                Segment::Page { start, end, .. } => *end - *start,
                Segment::Shared(bytes) => bytes.len(),
                // What has been offered ends before it.
                Segment::Piped(_) => return,
            };
            if there > len {
                match segment {
                    Segment::Page { start, .. } => *start += len,
                    Segment::Shared(bytes) => drop(bytes.split_to(len)),
                    Segment::Piped(_) => {}
                }
                return;
            }
            len -= there;
            if let Some(sent) = self.segments.pop_front() {
                self.recycle(sent);
            }
        }
    }

    /// Forgets everything that waits.
    pub(super) fn discard(&mut self) {
        self.segments.clear();
        self.pipes = 0;
        self.waiting_bytes = 0;
        self.sent_bytes = self.queued_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_in_which_they_came_however_they_are_cut() {
        let mut output = Output::default();
        let mut expected = Vec::new();
        for round in 0u32..200 {
            let piece: Vec<u8> = (0..round * 37 % 9000).map(|i| (i * 7 + round) as u8).collect();
            match round % 4 {
                0 => output.put(&piece),
                1 => output.put_shared(&Bytes::from(piece.clone())),
                2 if !piece.is_empty() => {
                    let mut pipe = Pipe::new().expect("a pipe");
                    assert_eq!(pipe.put(&piece).expect("put"), piece.len());
                    output.put_piped(pipe);
                }
                _ => {
                    output.room(piece.len() + 5)[..piece.len()].copy_from_slice(&piece);
                    output.commit(piece.len());
                }
            }
            expected.extend_from_slice(&piece);
        }
        assert_eq!(output.waiting_bytes(), expected.len());
        let (mut got, mut step) = (Vec::new(), 1);
        while output.waiting_bytes() > 0 {
            if let Some(pipe) = output.next_pipe() {
                let mut all = bytes::BytesMut::new();
                pipe.take(&mut all).expect("taken");
                got.extend_from_slice(&all);
                output.sent_piped(all.len());
                continue;
            }
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = output.slices(&mut slices);
            let flat: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
            step = (step * 31 + 7) % 20011;
            let len = (step + 1).min(flat.len());
            got.extend_from_slice(&flat[..len]);
            output.sent(len);
        }
        assert_eq!(got, expected);
        assert_eq!(output.sent_bytes(), output.queued_bytes());
        assert_eq!(output.pipes(), 0);
        assert!(output.drained_pipe().is_some_and(|pipe| pipe.is_empty()));
    }

    #[test]
    fn what_is_larger_than_a_page_is_cut() {
        let mut output = Output::default();
        output.put(&vec![7; 3 * PAGE_BYTES + 1]);
        assert_eq!(output.waiting_bytes(), 3 * PAGE_BYTES + 1);
    }
}
