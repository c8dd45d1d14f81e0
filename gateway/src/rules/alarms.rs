//! Alarms about rules that are stored and not enforced, or enforced and not stored.

use seawall_proto::{id::RuleId, rules::RuleSet};

use crate::state::State;

/// The alarm that operators see while there are stored rules that this version can't enforce.
pub const UNSUPPORTED_ALARM: &str = "rules_unsupported";
/// The alarm that operators see while the database lacks rules that are in force, or has some whose deletion it has lost.
pub const LOST_ALARM: &str = "rules_lost";

/// Alarms about the rules in force, as they were told last.
#[derive(Debug, Default)]
pub(super) struct Alarms {
    unsupported: Vec<RuleId>,
    lost: Vec<RuleId>,
    returned: Vec<RuleId>,
}

impl Alarms {
    /// Tells operators of rules that this version can't enforce, and of rules or deletions that the database has lost.
    pub(super) fn update(&mut self, state: &State, rules: &RuleSet) {
        let unsupported: Vec<RuleId> = rules.unsupported().iter().map(|rule| rule.id).collect();
        if unsupported != self.unsupported {
            let first = rules.unsupported().first();
            let detail = first.map_or_else(
                || "every stored rule is enforced again".to_owned(),
                |first| {
                    format!(
                        "{} stored rules are NOT enforced by this node, since its version can't: {} is one ({}). Bring the node to the version that wrote them, or delete them: seawall rules list",
                        unsupported.len(),
                        first.id,
                        first.problem
                    )
                },
            );
            state.alarm(UNSUPPORTED_ALARM, first.is_some(), detail);
            self.unsupported = unsupported;
        }
        let (lost, returned) = (state.rules.lost(), state.rules.returned());
        let lost: Vec<RuleId> = lost.iter().map(|lost| lost.rule.id).collect();
        let returned: Vec<RuleId> = returned.iter().map(|rule| rule.id).collect();
        if lost != self.lost || returned != self.returned {
            let mut detail = "every rule in force is in the database".to_owned();
            if let Some(first) = lost.first() {
                detail = format!(
                    "the database has lost {} rules that this node knows, or their rows can't be read any more: {first} is one. They stay in force on the nodes that know them. Make those anew that are right, then remove the lost ones: seawall rules list, seawall rules unblock {first}",
                    lost.len(),
                );
            }
            if let Some(first) = returned.first() {
                let before = if lost.is_empty() {
                    String::new()
                } else {
                    format!("{detail}. ")
                };
                detail = format!(
                    "{before}The database is older than this node: {} rules are in it that were not in force, most likely because they were deleted. They refuse devices and close no session here. Delete them again (seawall rules unblock {first}), or change them to keep them: {first} is one",
                    returned.len(),
                );
            }
            state.alarm(LOST_ALARM, !lost.is_empty() || !returned.is_empty(), detail);
            self.returned = returned;
            self.lost = lost;
        }
    }
}
