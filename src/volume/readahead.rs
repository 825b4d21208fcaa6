//! Guesses what a guest will read next. Pure: must not know fetches or files.

use crate::core::ids::BlockIndex;

/// The longest guess in blocks: 1 MiB at 64 KiB, what a guest kernel's own readahead asks for.
const MAX_WINDOW: u64 = 16;
/// Sequential readers that are told apart.
const STREAMS: usize = 8;

/// Follows a few sequential streams: the window doubles while the guest keeps to its stream.
#[derive(Debug, Default)]
pub struct Readahead {
    streams: Vec<Stream>,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    next: u64,
    fetched_to: u64,
    window: u64,
}

impl Readahead {
    /// The guest read these blocks; what to fetch ahead, in a volume of `blocks` blocks.
    pub fn on_read(&mut self, first: BlockIndex, count: u64, blocks: u64) -> std::ops::Range<u64> {
        let end = first.0 + count;
        let at = self.streams.iter().position(|s| s.next == first.0 || (s.next > first.0 && s.next <= end));
        let Some(at) = at else {
            if self.streams.len() == STREAMS {
                self.streams.remove(0);
            }
            self.streams.push(Stream { next: end, fetched_to: end, window: 1 });
            return end..end;
        };
        let mut stream = self.streams.remove(at);
        let mut guess = end..end;
        if end > stream.next || stream.fetched_to <= end {
            stream.window = (stream.window * 2).min(MAX_WINDOW);
            let from = stream.fetched_to.max(end);
            let to = (end + stream.window).min(blocks).max(from);
            stream.fetched_to = to;
            guess = from..to;
        }
        stream.next = end;
        self.streams.push(stream);
        guess
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_reads_fetch_nothing_ahead() {
        let mut readahead = Readahead::default();
        for block in [5, 900, 17, 400, 3, 77, 1000, 12, 654, 30] {
            assert!(readahead.on_read(BlockIndex(block), 1, 2000).is_empty());
        }
    }

    #[test]
    fn a_sequential_reader_is_led_and_nothing_is_guessed_twice_or_behind_the_end() {
        let mut readahead = Readahead::default();
        let mut guessed = Vec::new();
        for block in 0..100 {
            guessed.extend(readahead.on_read(BlockIndex(block), 1, 100));
        }
        let mut unique = guessed.clone();
        unique.dedup();
        assert_eq!(guessed, unique);
        assert!(guessed.iter().all(|block| *block < 100));
        assert!(guessed.len() > 90, "{}", guessed.len());
    }

    #[test]
    fn small_reads_within_a_block_keep_their_stream() {
        let mut readahead = Readahead::default();
        readahead.on_read(BlockIndex(10), 1, 100);
        let first = readahead.on_read(BlockIndex(11), 1, 100);
        assert!(!first.is_empty());
        readahead.on_read(BlockIndex(11), 1, 100);
        assert!(!readahead.on_read(BlockIndex(12), 1, 100).is_empty() || first.end > 12);
    }
}
