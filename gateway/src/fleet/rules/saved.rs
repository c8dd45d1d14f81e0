//! The rules on disk, for a start without the database.

use std::path::Path;

use seawall_proto::{
    id::RuleId,
    rules::{InForce, Lost, Returned, Rule, RuleSet},
    time::WallTime,
};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use crate::runtime::data_dir::{read_bounded, write_atomically};

/// Maximum length of the file, in bytes: [`RULES_MAX`](crate::store::RULES_MAX) rules take a fraction of it.
const BYTES_MAX: u64 = 64 << 20;

/// Content of the file. A later version may have written it, so unknown fields are ignored.
#[derive(Serialize, Deserialize)]
pub(super) struct Saved {
    revision: u64,
    /// Includes those that this version cannot enforce.
    rules: Vec<SavedRule>,
    /// Of `rules`, those that the database has lost.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lost: Vec<SavedLoss>,
    /// Of `rules`, those whose deletion the database has lost.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    returned: Vec<Returned>,
}

#[derive(Serialize, Deserialize)]
struct SavedLoss {
    id: RuleId,
    since: u64,
}

#[derive(Serialize, Deserialize)]
struct SavedRule {
    id: RuleId,
    /// The stored rule, byte by byte. A string if that is not JSON.
    spec: Box<RawValue>,
    created_at: WallTime,
    revision: u64,
}

impl Saved {
    fn of(set: &RuleSet, lost: &[Lost], returned: &[Returned]) -> Result<Self, serde_json::Error> {
        let rules = set.rules().iter().map(|rule| {
            Ok(SavedRule {
                id: rule.id,
                spec: to_raw_value(&rule.spec)?,
                created_at: rule.created_at,
                revision: rule.revision,
            })
        });
        let unsupported = set.unsupported().iter().map(|rule| {
            let json = RawValue::from_string(rule.spec.to_string());
            Ok(SavedRule {
                id: rule.id,
                spec: json.or_else(|_| to_raw_value(&rule.spec))?,
                created_at: rule.created_at,
                revision: rule.revision,
            })
        });
        Ok(Self {
            revision: set.revision(),
            rules: rules.chain(unsupported).collect::<Result<_, serde_json::Error>>()?,
            lost: lost
                .iter()
                .map(|lost| SavedLoss {
                    id: lost.rule.id,
                    since: lost.since,
                })
                .collect(),
            returned: returned.to_vec(),
        })
    }

    pub(super) fn into_in_force(self) -> InForce {
        let (mut rules, mut unsupported) = (Vec::new(), Vec::new());
        for saved in self.rules {
            let text = serde_json::from_str::<String>(saved.spec.get());
            let spec = text.as_deref().unwrap_or_else(|_| saved.spec.get());
            match Rule::read(saved.id, spec, saved.created_at, saved.revision) {
                Ok(rule) => rules.push(rule),
                Err(found) => unsupported.push(found),
            }
        }
        let lost = self.lost.iter().filter_map(|lost| {
            let rule = rules.iter().find(|rule| rule.id == lost.id)?.clone();
            let since = lost.since;
            Some(Lost { rule, since })
        });
        let lost = lost.collect();
        InForce {
            set: RuleSet::compile_stored(self.revision, rules, unsupported),
            lost,
            returned: self.returned,
        }
    }
}

pub(super) fn read(file: &Path) -> Result<Option<Saved>, std::io::Error> {
    match read_bounded(file, BYTES_MAX) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(std::io::Error::other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn save(file: &Path, set: &RuleSet, lost: &[Lost], returned: &[Returned]) -> Result<(), std::io::Error> {
    let saved = Saved::of(set, lost, returned)?;
    write_atomically(file, &serde_json::to_vec(&saved)?, 0o644)
}
