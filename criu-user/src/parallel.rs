//! Work that several processors share.

use std::num::NonZero;
use std::sync::OnceLock;
use std::thread;

/// More threads than this wait for locks of the kernel's rather than work.
const MOST: usize = 8;
/// It takes as long to start a thread as to open five files; so many items at least are worth one.
const LEAST: usize = 32;

/// Processors that we may use; asked once, for the answer is in half a dozen files.
pub fn processors() -> usize {
    static KNOWN: OnceLock<usize> = OnceLock::new();
    *KNOWN.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// Shares items out among as many threads as we may use processors, in pieces; what each has come to is in their order.
pub fn share<T: Sync, R: Send>(items: &[T], work: impl Fn(&[T]) -> R + Sync) -> Vec<R> {
    let threads = processors().min(MOST);
    let piece = items.len().div_ceil(threads).max(LEAST);
    thread::scope(|scope| {
        let work = &work;
        let mut pieces = items.chunks(piece);
        let own = pieces.next();
        let others: Vec<_> = pieces.map(|piece| scope.spawn(move || work(piece))).collect();
        let joined = |other: thread::ScopedJoinHandle<'_, R>| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        own.map(work).into_iter().chain(others.into_iter().map(joined)).collect()
    })
}

/// Does the same to each item, shared out; the results are in the items' order.
pub fn map<T: Sync, R: Send>(items: &[T], one: impl Fn(&T) -> R + Sync) -> Vec<R> {
    share(items, |piece| piece.iter().map(&one).collect::<Vec<R>>()).into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_order() {
        let items: Vec<u32> = (0..1001).collect();
        let sums = share(&items, |piece| piece.to_vec()).concat();
        assert_eq!(sums, items);
        assert_eq!(map(&items, |item| item + 1), (1..1002).collect::<Vec<u32>>());
        assert!(share(&[], |piece: &[u32]| piece.len()).is_empty());
    }
}
