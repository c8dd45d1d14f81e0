//! Changes of rules that this node has written to the database, and puts in force without reading them back.

use seawall_proto::{
    id::RuleId,
    rules::{Rule, RuleSet},
};

/// A change of the rules that this node has written to the database.
#[derive(Clone, Debug)]
pub enum Written {
    /// Created or changed. Its revision is that of the rule set.
    Rule(Rule),
    Deleted {
        rule: RuleId,
        revision: u64,
    },
}

impl Written {
    /// The rule that was changed.
    #[must_use]
    pub const fn id(&self) -> RuleId {
        match self {
            Self::Rule(rule) => rule.id,
            Self::Deleted { rule, .. } => *rule,
        }
    }

    const fn revision(&self) -> u64 {
        match self {
            Self::Rule(rule) => rule.revision,
            Self::Deleted { revision, .. } => *revision,
        }
    }

    /// `base` with this change; `None` if it already has it. If `base` lacks earlier changes of other nodes, it keeps
    /// its revision, so that the next poll reads those.
    pub(super) fn onto(self, base: &RuleSet) -> Option<RuleSet> {
        let revision = self.revision();
        if base.revision() >= revision {
            return None;
        }
        let is_next = base.revision() + 1 == revision;
        let (mut rules, mut unsupported) = (base.rules().to_vec(), base.unsupported().to_vec());
        match self {
            Self::Rule(rule) => {
                if rules
                    .iter()
                    .any(|other| other.id == rule.id && other.revision >= revision)
                {
                    return None;
                }
                rules.retain(|other| other.id != rule.id);
                rules.push(rule);
            }
            Self::Deleted { rule, .. } => {
                rules.retain(|other| other.id != rule);
                unsupported.retain(|other| other.id != rule);
            }
        }
        let labelled = if is_next { revision } else { base.revision() };
        Some(RuleSet::compile_stored(labelled, rules, unsupported))
    }
}
