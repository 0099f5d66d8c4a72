//! A queue between threads whose receiver sleeps until something arrives: the processors belong to
//! the ranks, and channels of the standard library spin first.

use parking_lot::{Condvar, Mutex, MutexGuard};
use std::{collections::VecDeque, sync::Arc, time::Duration};

pub(super) struct Queue<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    /// Most items that `push` leaves in the queue.
    capacity: usize,
    arrived: Condvar,
    taken: Condvar,
}

struct State<T> {
    items: VecDeque<T>,
    is_closed: bool,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Queue<T> {
        Queue::bounded(usize::MAX)
    }

    /// Returns a queue of `capacity` items. A sender waits while it is full.
    pub(super) fn bounded(capacity: usize) -> Queue<T> {
        let shared = Shared {
            state: Mutex::new(State {
                items: VecDeque::new(),
                is_closed: false,
            }),
            capacity,
            arrived: Condvar::new(),
            taken: Condvar::new(),
        };
        Queue {
            shared: Arc::new(shared),
        }
    }

    /// Adds an item, and waits first while the queue is full.
    pub(super) fn push(&self, item: T) {
        let mut state = self.shared.state.lock();
        while state.items.len() >= self.shared.capacity && !state.is_closed {
            self.shared.taken.wait(&mut state);
        }
        self.add(state, item);
    }

    /// Adds an item even if the queue is full: the receiver cannot wait for itself.
    pub(super) fn push_now(&self, item: T) {
        self.add(self.shared.state.lock(), item);
    }

    fn add(&self, mut state: MutexGuard<'_, State<T>>, item: T) {
        if !state.is_closed {
            state.items.push_back(item);
            self.shared.arrived.notify_one();
        }
    }

    /// Ends the queue: the receiver takes no more, so nothing waits any more.
    pub(super) fn close(&self) {
        let mut state = self.shared.state.lock();
        state.is_closed = true;
        state.items.clear();
        self.shared.taken.notify_all();
    }

    /// Returns the first item, if there is one.
    pub(super) fn pop_now(&self) -> Option<T> {
        self.take(self.shared.state.lock())
    }

    /// Returns the first item, or None if none arrives within `timeout`.
    pub(super) fn pop(&self, timeout: Duration) -> Option<T> {
        let mut state = self.shared.state.lock();
        if state.items.is_empty() {
            self.shared.arrived.wait_for(&mut state, timeout);
        }
        self.take(state)
    }

    fn take(&self, mut state: MutexGuard<'_, State<T>>) -> Option<T> {
        let item = state.items.pop_front();
        self.shared.taken.notify_one();
        item
    }
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Queue<T> {
        let shared = self.shared.clone();
        Queue { shared }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_makes_senders_wait_and_drops_nothing() {
        const ITEMS: usize = 1000;
        let queue = Queue::bounded(4);
        let longest = std::thread::scope(|scope| {
            let sender = queue.clone();
            scope.spawn(move || {
                for item in 0..ITEMS {
                    sender.push(item);
                }
            });
            let mut longest = 0;
            for expected in 0..ITEMS {
                longest = longest.max(queue.shared.state.lock().items.len());
                assert_eq!(queue.pop(Duration::from_secs(60)), Some(expected));
            }
            longest
        });
        assert!(longest <= 4, "{longest}");
    }

    #[test]
    fn the_receiver_itself_never_waits_and_a_closed_queue_lets_senders_go() {
        let queue = Queue::bounded(1);
        queue.push_now(1);
        queue.push_now(2);
        std::thread::scope(|scope| {
            let sender = queue.clone();
            let waits = scope.spawn(move || sender.push(3));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished());
            queue.close();
        });
        assert_eq!(queue.pop_now(), None);
    }
}
