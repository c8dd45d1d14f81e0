//! Changes of rules that the database does not have yet: in the journal on disk, and in force on this node.

use std::sync::Arc;

use seawall_proto::{
    id::RuleId,
    rules::{LocalWrite, RuleSet, RuleSpec, overlay},
};
use uuid::Uuid;

use super::{
    Rules,
    journal::{Journal, JournalError},
};
use crate::{
    fleet::events::Events,
    runtime::{clock::Clock, lifecycle::blocking},
};

/// Changes of rules that wait for the database.
#[derive(Debug, Default)]
pub struct Local {
    /// Oldest first.
    pub writes: Vec<LocalWrite>,
    /// Rules in force that the database does not have in this form, sorted.
    rules: Vec<RuleId>,
}

impl Local {
    /// Rules of unconfirmed changes.
    pub fn unconfirmed(&self) -> impl Iterator<Item = (RuleId, &RuleSpec)> {
        let unconfirmed = self.writes.iter().filter(|write| !write.is_confirmed);
        unconfirmed.filter_map(|write| Some((write.rule, write.after.as_ref()?)))
    }

    /// Whether the database does not have the rule in the form that is in force.
    #[must_use]
    pub fn has(&self, rule: RuleId) -> bool {
        self.rules.binary_search(&rule).is_ok()
    }
}

/// Rules to put in force: the stored ones, those with local changes, and these changes.
pub(super) struct Sets {
    pub stored: Arc<RuleSet>,
    pub current: Arc<RuleSet>,
    pub local: Arc<Local>,
}

impl Sets {
    pub fn of(stored: Arc<RuleSet>, writes: Vec<LocalWrite>) -> Self {
        if writes.is_empty() {
            return Self {
                current: Arc::clone(&stored),
                stored,
                local: Arc::default(),
            };
        }
        let (current, rules) = overlay(&stored, &writes);
        Self {
            stored,
            current: Arc::new(current),
            local: Arc::new(Local { writes, rules }),
        }
    }
}

impl Rules {
    /// The rules in force without changes that wait for the database.
    pub(crate) fn stored(&self) -> Arc<RuleSet> {
        self.stored.load_full()
    }

    /// Revision of the database up to which its changes are in force here.
    #[must_use]
    pub fn stored_revision(&self) -> u64 {
        self.stored.load().revision()
    }

    /// Changes that wait for the database.
    #[must_use]
    pub fn local(&self) -> Arc<Local> {
        self.local.load_full()
    }

    /// Lines of the journal that could not be read at the start.
    #[must_use]
    pub fn journal_damage(&self) -> Option<&str> {
        self.journal_damage.as_deref()
    }

    /// Keeps a change in the journal, and puts it in force. Makes no query.
    ///
    /// # Errors
    /// The change cannot be kept on disk, or the rule has changed since its author read it. It is not in force then.
    ///
    /// # Cancel safety
    /// None: the change may be kept, and in force after the next one or a restart.
    pub async fn write_local(&self, write: LocalWrite, clock: &Clock, events: &Events) -> Result<(), JournalError> {
        self.change_journal(clock, events, move |journal, current| {
            let now = current.rules().iter().find(|rule| rule.id == write.rule);
            let now = now.map(|rule| &rule.spec);
            // The database may have applied the change without this node having the answer.
            if now != write.before.as_ref() && now != write.after.as_ref() {
                return Err(JournalError::Changed);
            }
            journal.append(write)
        })
        .await
    }

    /// Drops these local changes, which the database and [`Rules::stored`] have.
    ///
    /// # Errors
    /// The journal cannot be written. They stay.
    pub(crate) async fn drop_local(
        &self,
        moved: Vec<Uuid>,
        clock: &Clock,
        events: &Events,
    ) -> Result<(), JournalError> {
        self.change_journal(clock, events, move |journal, _| journal.drop_moved(&moved))
            .await
    }

    /// Changes the journal, and then the rules in force.
    async fn change_journal(
        &self,
        clock: &Clock,
        events: &Events,
        change: impl FnOnce(&mut Journal, &RuleSet) -> Result<(), JournalError> + Send + 'static,
    ) -> Result<(), JournalError> {
        let mut journal = Arc::clone(&self.journal).lock_owned().await;
        // Includes all earlier local changes, because the journal is locked.
        let current = self.current();
        let changing = blocking(move || {
            let changed = change(&mut journal, &current);
            (journal, changed)
        });
        let Some((journal, changed)) = changing.await else {
            return Ok(());
        };
        changed?;
        loop {
            let (stored, writes) = (self.stored(), journal.writes().to_vec());
            let onto = Arc::clone(&stored);
            let Some(sets) = blocking(move || Sets::of(onto, writes)).await else {
                return Ok(());
            };
            let _guard = self.writes();
            // Other rules were stored meanwhile: repeat with those.
            if Arc::ptr_eq(&stored, &self.stored()) {
                self.put_in_force(sets, clock, events);
                return Ok(());
            }
        }
    }
}
