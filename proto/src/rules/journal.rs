//! Changes of rules that wait in a node's journal until the database accepts them.
//!
//! This module decides how such a change affects the node's rules meanwhile, and what is written to the database later.
//! The rule may have been changed or deleted in the database in the meantime. Then the stricter outcome wins: no device
//! that one of the two authors refuses is admitted.
//!
//! The changes of one rule are moved as their net effect: a form that its author withdrew never reaches the database.
//! Start with [`chains`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Rule, RuleSet, RuleSpec};
use crate::{id::RuleId, time::WallTime};

/// A change of one rule that the database does not have yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalWrite {
    /// Id of this change. The database applies a change with the same id at most once. A conflict may create a rule
    /// with it.
    pub id: Uuid,
    pub rule: RuleId,
    /// Time of the change.
    pub at: WallTime,
    /// Author of the change, as in the audit log.
    pub actor: String,
    /// Whether its author confirmed that it refuses many devices.
    pub is_confirmed: bool,
    /// The rule that its author changed. `None` for a new rule.
    pub before: Option<RuleSpec>,
    /// The rule after the change. `None` deletes it.
    pub after: Option<RuleSpec>,
}

/// State of a rule in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored<'a> {
    Missing,
    Rule(&'a RuleSpec),
    /// This version cannot read it.
    Unsupported,
    /// It is missing, and in force as a lost rule.
    Lost,
    /// Its row is damaged, and it is in force as a lost rule.
    Damaged,
}

crate::labels! {
    /// Result of a change when it reaches the database.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Settlement {
        Inserted = "inserted",
        Updated = "updated",
        /// A rule that is missing already is deleted on the nodes that keep it as lost.
        Deleted = "deleted",
        /// The database already has this form.
        Unchanged = "unchanged",
        /// Conflict: the rule was deleted meanwhile. It is created again, as the change says.
        Restored = "restored",
        /// Conflict: the rule was changed meanwhile. It stays as it is, and the change becomes a second rule, with the
        /// id of the change.
        Split = "split",
        /// Conflict: the rule was changed meanwhile, so it is not deleted.
        Kept = "kept",
    }
}

impl Settlement {
    /// Whether another author changed the rule meanwhile, so that an operator should review the outcome.
    #[must_use]
    pub const fn is_conflict(self) -> bool {
        match self {
            Self::Restored | Self::Split | Self::Kept => true,
            Self::Inserted | Self::Updated | Self::Deleted | Self::Unchanged => false,
        }
    }
}

impl LocalWrite {
    /// Decides the result of this change, for a rule in this state in the database.
    ///
    /// The content of a rule decides, not its revision: a rule that was changed and changed back has no conflict.
    ///
    /// A rule whose deletion the database lost is seen without its `evict`, so `evict` is not compared there.
    #[must_use]
    pub fn settlement(&self, stored: Stored<'_>) -> Settlement {
        match (&self.before, &self.after, stored) {
            (before, after, _) if before == after => Settlement::Unchanged,
            (_, None, Stored::Lost | Stored::Damaged) => Settlement::Deleted,
            (_, Some(_), Stored::Lost) => Settlement::Inserted,
            (_, Some(_), Stored::Damaged) => Settlement::Updated,
            (None, Some(_), Stored::Missing) => Settlement::Inserted,
            // Ids are random, so it is this very rule. It arrived earlier, and may have been changed since.
            (None, Some(_), Stored::Rule(_) | Stored::Unsupported) => Settlement::Unchanged,
            (Some(_), Some(after), Stored::Rule(stored)) if stored == after => Settlement::Unchanged,
            (Some(before), Some(_), Stored::Rule(stored)) if is_as_seen(stored, before) => Settlement::Updated,
            (Some(_), Some(_), Stored::Missing) => Settlement::Restored,
            (Some(_), Some(_), Stored::Rule(_) | Stored::Unsupported) => Settlement::Split,
            (_, None, Stored::Missing) => Settlement::Deleted,
            (Some(before), None, Stored::Rule(stored)) if is_as_seen(stored, before) => Settlement::Deleted,
            (_, None, Stored::Rule(_) | Stored::Unsupported) => Settlement::Kept,
        }
    }

    /// The rule that `settlement` writes, and its id.
    #[must_use]
    pub fn written(&self, settlement: Settlement) -> Option<(RuleId, &RuleSpec)> {
        let id = match settlement {
            Settlement::Inserted | Settlement::Updated | Settlement::Restored => self.rule,
            Settlement::Split => RuleId(self.id),
            Settlement::Deleted | Settlement::Unchanged | Settlement::Kept => return None,
        };
        self.after.as_ref().map(|spec| (id, spec))
    }

    /// Whether it may refuse devices that were not refused before.
    fn hits_others(&self) -> bool {
        match (&self.before, &self.after) {
            (_, None) => false,
            (None, Some(after)) => !after.is_harmless(),
            (Some(before), Some(after)) => after.is_wider_than(before),
        }
    }

    /// Whether the devices that it refuses must be counted, on all nodes, before it is written to the database.
    #[must_use]
    pub fn needs_check(&self) -> bool {
        !self.is_confirmed && self.hits_others()
    }
}

fn is_as_seen(stored: &RuleSpec, seen: &RuleSpec) -> bool {
    let is_returned = stored.evict && !seen.evict;
    stored == seen
        || is_returned && {
            let evict = false;
            RuleSpec {
                evict,
                ..stored.clone()
            } == *seen
        }
}

/// Changes of one rule by one node, oldest first. Each starts from the result of the previous one.
pub type Chain<'a> = Vec<&'a LocalWrite>;

/// Groups changes into chains, in the order of their first changes. A chain ends where another author's change came
/// between.
#[must_use]
pub fn chains<'a>(writes: impl IntoIterator<Item = &'a LocalWrite>) -> Vec<Chain<'a>> {
    let mut chains: Vec<Chain<'a>> = Vec::new();
    let mut last: BTreeMap<RuleId, usize> = BTreeMap::new();
    for write in writes {
        let chain = last.get(&write.rule).and_then(|at| chains.get_mut(*at));
        match chain {
            Some(chain) if chain.last().is_some_and(|last| last.after == write.before) => chain.push(write),
            Some(_) | None => {
                last.insert(write.rule, chains.len());
                chains.push(vec![write]);
            }
        }
    }
    chains
}

/// Net effect of a chain: one change, with the id, author and time of the last. `None` for an empty chain.
#[must_use]
pub fn net(chain: &[&LocalWrite]) -> Option<LocalWrite> {
    let (first, last) = (chain.first()?, chain.last()?);
    let is_confirmed = chain.iter().fold(false, |is_confirmed, write| {
        write.is_confirmed || (is_confirmed && !write.hits_others())
    });
    Some(LocalWrite {
        before: first.before.clone(),
        is_confirmed,
        ..(*last).clone()
    })
}

/// The rules of a node: those of the database with these changes applied in order. Also returns the ids of rules that
/// the database does not have in this form, sorted.
///
/// The database may have applied some of the changes already: those up to one after which the rule is as stored.
#[must_use]
pub fn overlay(stored: &RuleSet, writes: &[LocalWrite]) -> (RuleSet, Vec<RuleId>) {
    let by_id: BTreeMap<RuleId, &RuleSpec> = stored.rules().iter().map(|rule| (rule.id, &rule.spec)).collect();
    let mut made: BTreeMap<RuleId, usize> = BTreeMap::new();
    for (at, write) in writes.iter().enumerate() {
        if by_id.get(&write.rule).copied() == write.after.as_ref() {
            made.insert(write.rule, at);
        }
    }
    let waiting = writes.iter().enumerate();
    let waiting = waiting.filter(|(at, write)| made.get(&write.rule).is_none_or(|made| made < at));
    let mut rules = stored.rules().to_vec();
    let mut local = Vec::new();
    for write in chains(waiting.map(|(_, write)| write))
        .iter()
        .filter_map(|chain| net(chain))
    {
        let found = rules.iter().find(|rule| rule.id == write.rule);
        let is_unsupported = stored.unsupported().iter().any(|rule| rule.id == write.rule);
        let settlement = write.settlement(match found {
            Some(rule) => Stored::Rule(&rule.spec),
            None if is_unsupported => Stored::Unsupported,
            None => Stored::Missing,
        });
        if settlement == Settlement::Deleted {
            rules.retain(|rule| rule.id != write.rule);
            local.retain(|id| *id != write.rule);
        }
        let Some((id, spec)) = write.written(settlement) else {
            continue;
        };
        match rules.iter_mut().find(|rule| rule.id == id) {
            // The database has the second rule, and this node has not yet read that the change is settled.
            Some(_) if settlement == Settlement::Split => continue,
            Some(rule) => rule.spec = spec.clone(),
            None => rules.push(Rule {
                id,
                spec: spec.clone(),
                created_at: write.at,
                revision: stored.revision(),
            }),
        }
        local.push(id);
    }
    local.sort_unstable();
    local.dedup();
    (
        RuleSet::compile_stored(stored.revision(), rules, stored.unsupported().to_vec()),
        local,
    )
}

#[cfg(test)]
mod tests;
