//! How many changes one call to the database stores, and which change is given up.
//!
//! A call that fails is made again with half of its changes. So a slow database keeps up, and a bad change stops no
//! others. Start with [`Batches`].

/// Maximum number of changes in a row that are set aside. If so many fail alone, the database is at fault.
const ASIDE_MAX: usize = 20;

/// Why a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The database is away, slow or busy: the same call may succeed later.
    Passing,
    /// The database refuses what it was given.
    Refused,
}

/// What to do after a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Make the next call at once: it is another one.
    AtOnce,
    /// Wait first.
    Wait,
}

/// Sizes of the calls that store a queue.
#[derive(Clone, Copy, Debug)]
pub struct Batches {
    size: usize,
    max: usize,
    aside: usize,
}

impl Batches {
    /// Begins with calls of `max` changes.
    #[must_use]
    pub const fn new(max: usize) -> Self {
        Self {
            size: max,
            max,
            aside: 0,
        }
    }

    /// Maximum number of changes in the next call.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Number of the oldest changes that the next call leaves out: each of them failed alone.
    #[must_use]
    pub const fn aside(&self) -> usize {
        self.aside
    }

    /// A call succeeded. `was_quick`: a call with twice as many changes has time enough. Returns the number of changes
    /// that were set aside before it, and are given up: the database takes others.
    pub fn handle_stored(&mut self, was_quick: bool) -> usize {
        if was_quick {
            self.size = self.max.min(2 * self.size);
        }
        std::mem::take(&mut self.aside)
    }

    /// A call with `sent` changes failed.
    pub fn handle_failed(&mut self, sent: usize, failure: Failure) -> Next {
        if sent > 1 {
            self.size = sent / 2;
            return match failure {
                Failure::Passing => Next::Wait,
                Failure::Refused => Next::AtOnce,
            };
        }
        self.size = 1;
        if failure == Failure::Refused && self.aside < ASIDE_MAX {
            self.aside += 1;
            return Next::AtOnce;
        }
        // From the oldest on again.
        self.aside = 0;
        Next::Wait
    }

    /// Nothing is left behind the changes that were set aside. They are tried again, after a wait.
    pub const fn handle_end(&mut self) -> Next {
        self.aside = 0;
        Next::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stores `len` changes of which those in `bad` are refused. Returns those that were given up, and the number of
    /// calls.
    fn store(len: usize, bad: &[usize]) -> (Vec<usize>, usize) {
        let mut batches = Batches::new(1_000);
        let mut queue: Vec<usize> = (0..len).collect();
        let (mut given_up, mut calls) = (Vec::new(), 0);
        while queue.len() > batches.aside() {
            calls += 1;
            assert!(calls < 1_000);
            let sent: Vec<usize> = queue
                .iter()
                .skip(batches.aside())
                .take(batches.size())
                .copied()
                .collect();
            if sent.iter().any(|change| bad.contains(change)) {
                batches.handle_failed(sent.len(), Failure::Refused);
            } else {
                let aside = batches.handle_stored(true);
                given_up.extend(queue.drain(..aside));
                queue.drain(..sent.len());
            }
        }
        (given_up, calls)
    }

    #[test]
    fn one_bad_change_is_given_up_and_all_others_are_stored() {
        let (given_up, calls) = store(5_000, &[1_234]);

        assert_eq!(given_up, [1_234]);
        assert!(calls < 50, "{calls}");
        assert_eq!(store(3_000, &[0, 1, 2, 1_500]).0, [0, 1, 2, 1_500]);
    }

    #[test]
    fn nothing_is_given_up_while_the_database_takes_nothing() {
        let mut batches = Batches::new(1_000);
        for _ in 0..500 {
            let sent = batches.size();
            batches.handle_failed(sent, Failure::Refused);
            assert!(batches.aside() <= ASIDE_MAX);
        }
        let waits = (0..3 * (ASIDE_MAX + 1)).filter(|_| batches.handle_failed(1, Failure::Refused) == Next::Wait);
        assert_eq!(waits.count(), 3, "it waits in between");

        let mut batches = Batches::new(1_000);
        for _ in 0..100 {
            let sent = batches.size();
            assert_eq!(batches.handle_failed(sent, Failure::Passing), Next::Wait);
        }
        assert_eq!((batches.size(), batches.aside()), (1, 0));
        assert_eq!(batches.handle_stored(true), 0);
    }

    #[test]
    fn slow_database_gets_as_many_as_it_stores_in_time() {
        let mut batches = Batches::new(1_000);
        let mut sizes = Vec::new();
        for _ in 0..40 {
            let sent = batches.size();
            // It stores 100 within the deadline, and 25 within a quarter of it.
            if sent > 100 {
                batches.handle_failed(sent, Failure::Passing);
            } else {
                batches.handle_stored(sent <= 25);
                sizes.push(sent);
            }
        }
        assert_eq!(sizes.len(), 36);
        assert!(sizes.iter().all(|sent| *sent == 62), "{sizes:?}");
        for _ in 0..8 {
            batches.handle_stored(true);
        }
        assert_eq!(batches.size(), 1_000);
    }
}
