//! A queue between threads whose receiver sleeps until something arrives: the processors belong to
//! the ranks, and channels of the standard library spin first.

use parking_lot::{Condvar, Mutex};
use std::{collections::VecDeque, sync::Arc, time::Duration};

pub(super) struct Queue<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    items: Mutex<VecDeque<T>>,
    arrived: Condvar,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Queue<T> {
        let shared = Shared {
            items: Mutex::new(VecDeque::new()),
            arrived: Condvar::new(),
        };
        Queue {
            shared: Arc::new(shared),
        }
    }

    pub(super) fn push(&self, item: T) {
        self.shared.items.lock().push_back(item);
        self.shared.arrived.notify_one();
    }

    /// Returns the first item, if there is one.
    pub(super) fn pop_now(&self) -> Option<T> {
        self.shared.items.lock().pop_front()
    }

    /// Returns the first item, or None if none arrives within `timeout`.
    pub(super) fn pop(&self, timeout: Duration) -> Option<T> {
        let mut items = self.shared.items.lock();
        if items.is_empty() {
            self.shared.arrived.wait_for(&mut items, timeout);
        }
        items.pop_front()
    }
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Queue<T> {
        let shared = self.shared.clone();
        Queue { shared }
    }
}
