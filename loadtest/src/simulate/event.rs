//! What happens in a simulation, in eight bytes each; and what is on its way to devices.

use seawall_proto::{
    close::Close,
    refusal::{Code, Hint},
};

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Event {
    /// A device's timer.
    Wake {
        device: u32,
    },
    /// A device's SYN is at a node's door.
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
    /// An answer, or a close frame, is at its device.
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
    /// A statement has had all the time that it may take.
    StatementLate {
        statement: u32,
    },
    /// A statement has failed.
    StatementFailed {
        statement: u32,
    },
    /// A node's deadlines.
    Node {
        node: u8,
    },
    /// A stranger's SYN, and its request.
    Stranger,
    StrangerRequest {
        node: u8,
    },
    /// Something of this phase is due.
    Act {
        phase: u8,
    },
    /// This phase is over.
    PhaseEnd {
        phase: u8,
    },
    /// A look at how the phase stands.
    Look {
        phase: u8,
    },
    /// The run is over.
    Finish,
    /// A node ends sessions that a rule does not want.
    Evict {
        node: u8,
    },
    /// Something befalls a node, or devices.
    Incident {
        number: u8,
    },
    /// A node that died is there again.
    Back {
        node: u8,
    },
    /// A node that drains closes sessions.
    Leave {
        node: u8,
    },
}

impl Event {
    /// Whom it concerns, where that is one device.
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
            | Self::Evict { .. }
            | Self::Incident { .. }
            | Self::Back { .. }
            | Self::Leave { .. } => None,
        }
    }
}

/// What is on its way to a device.
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
    /// No answer: a reset.
    Reset,
    Closed(Close),
}

/// Letters under way, by number; numbers are used again.
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

    /// To whom it goes.
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
