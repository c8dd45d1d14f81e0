//! Alarms about rules that are stored and not enforced, or enforced and not stored.

use seawall_proto::{id::RuleId, rules::RuleSet};

use crate::state::State;

/// The alarm that operators see while there are stored rules that this version can't enforce.
pub const UNSUPPORTED_ALARM: &str = "rules_unsupported";
/// The alarm that operators see while the database lacks rules that are in force.
pub const LOST_ALARM: &str = "rules_lost";

/// Alarms about the rules in force, as they were told last.
#[derive(Debug, Default)]
pub(super) struct Alarms {
    unsupported: Vec<RuleId>,
    lost: Vec<RuleId>,
}

impl Alarms {
    /// Tells operators of rules that this version can't enforce, and of rules that the database has lost.
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
        let rules = state.rules.lost();
        let lost: Vec<RuleId> = rules.iter().map(|lost| lost.rule.id).collect();
        if lost != self.lost {
            let first = rules.first().map(|lost| &lost.rule);
            let detail = first.map_or_else(
                || "every rule in force is in the database".to_owned(),
                |first| {
                    format!(
                        "the database has lost {} rules that this node knows, or their rows can't be read any more: {} is one. They stay in force on the nodes that know them. Make those anew that are right, then remove the lost ones: seawall rules list, seawall rules unblock {}",
                        lost.len(),
                        first.id,
                        first.id
                    )
                },
            );
            state.alarm(LOST_ALARM, first.is_some(), detail);
            self.lost = lost;
        }
    }
}
