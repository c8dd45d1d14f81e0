//! Events of a simulation, in eight bytes each, and answers on their way to devices.

use seawall_proto::{
    close::Close,
    refusal::{Code, Hint},
};

/// An event of the simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Event {
    /// A device's timer.
    Wake {
        device: u32,
    },
    /// A device's SYN arrives.
    Syn {
        device: u32,
        attempt: u16,
        tries: u8,
    },
    /// A device's request is complete at a node.
    Request {
        device: u32,
        attempt: u16,
        node: u8,
    },
    /// An answer or a close frame arrives at its device.
    Letter {
        number: u32,
    },
    /// A node learns that a device has gone.
    Hangup {
        device: u32,
        attempt: u16,
        node: u8,
    },
    /// The database's next statement is done, if nothing has changed since.
    Database {
        version: u32,
    },
    /// A statement has reached its time limit.
    StatementLate {
        statement: u32,
    },
    /// A statement has failed.
    StatementFailed {
        statement: u32,
    },
    /// Deadlines of a node are due.
    Node {
        node: u8,
    },
    /// An unknown device's SYN, and its request.
    Stranger,
    StrangerRequest {
        node: u8,
    },
    /// An action of this phase is due.
    Act {
        phase: u8,
    },
    /// This phase is over.
    PhaseEnd {
        phase: u8,
    },
    /// A check of whether the phase is over.
    Look {
        phase: u8,
    },
    /// The run is over.
    Finish,
    /// Departures of a node are due.
    Depart {
        node: u8,
    },
    /// An incident of the scenario happens.
    Incident {
        number: u8,
    },
    /// A node that died accepts connections again.
    Back {
        node: u8,
    },
}

impl Event {
    /// The device that it concerns, if it is one.
    pub fn device(&self, letters: &Letters) -> Option<u32> {
        match *self {
            Self::Wake { device }
            | Self::Syn { device, .. }
            | Self::Request { device, .. }
            | Self::Hangup { device, .. } => Some(device),
            Self::Letter { number } => letters.device(number),
            Self::Database { .. }
            | Self::StatementLate { .. }
            | Self::StatementFailed { .. }
            | Self::Node { .. }
            | Self::Stranger
            | Self::StrangerRequest { .. }
            | Self::Act { .. }
            | Self::PhaseEnd { .. }
            | Self::Look { .. }
            | Self::Finish
            | Self::Depart { .. }
            | Self::Incident { .. }
            | Self::Back { .. } => None,
        }
    }
}

/// A message under way to a device.
#[derive(Debug)]
pub(super) struct Letter {
    pub device: u32,
    pub attempt: u16,
    pub content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    Connected,
    Refused(Code, Option<Hint>),
    /// A reset instead of an answer.
    Reset,
    Closed(Close),
}

/// Letters on their way, by number. Numbers are reused.
#[derive(Debug, Default)]
pub(super) struct Letters {
    letters: Vec<Option<Letter>>,
    free: Vec<u32>,
}

impl Letters {
    pub fn put(&mut self, letter: Letter) -> u32 {
        if let Some(number) = self.free.pop() {
            self.letters[number as usize] = Some(letter);
            return number;
        }
        self.letters.push(Some(letter));
        u32::try_from(self.letters.len() - 1).unwrap_or(u32::MAX)
    }

    /// Its recipient.
    pub fn device(&self, number: u32) -> Option<u32> {
        let letter = self.letters.get(number as usize)?.as_ref()?;
        Some(letter.device)
    }

    pub fn take(&mut self, number: u32) -> Option<Letter> {
        let letter = self.letters.get_mut(number as usize)?.take();
        self.free.push(number);
        letter
    }
}
