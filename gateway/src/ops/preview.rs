//! Checks of a rule that is to be written. Start with [`Checked::of`].

use seawall_proto::{id::RuleId, rules::RuleSpec};

use super::{Api, problem::Problem};
pub use crate::node::preview::{Basis, RulePreview};
use crate::{
    session::census::Census,
    store::{RuleCheck, StoreError},
};

/// A preview, and the devices that it is based on.
pub struct Checked {
    pub preview: RulePreview,
    pub basis: Basis,
}

impl Checked {
    /// Matches `spec` with all devices that the cluster knows. `of` is the rule that it changes, which is not added up
    /// with it. While the database is away, with those of this node. If it is only slow, the preview requires a
    /// confirmation.
    ///
    /// # Errors
    /// The gateway failed.
    pub async fn of(api: &Api, spec: &RuleSpec, of: Option<RuleId>) -> Result<Self, Problem> {
        let (check, basis) = look(api).await;
        let spec = spec.clone();
        api.scan_devices(move |gateway| {
            let census = Census::of(&gateway.sessions, &gateway.history);
            let preview = RulePreview::of(&spec, of, &check, basis, &census, gateway);
            Self { preview, basis }
        })
        .await
    }

    /// Previews of several rules, each as if it were the only one. The devices are counted once.
    ///
    /// # Errors
    /// The gateway failed.
    pub async fn previews(api: &Api, specs: Vec<RuleSpec>) -> Result<Vec<RulePreview>, Problem> {
        let (check, basis) = look(api).await;
        api.scan_devices(move |gateway| {
            let census = Census::of(&gateway.sessions, &gateway.history);
            let of = |spec| RulePreview::of(spec, None, &check, basis, &census, gateway);
            specs.iter().map(of).collect()
        })
        .await
    }
}

/// Asks for the devices of other nodes.
async fn look(api: &Api) -> (Result<RuleCheck, StoreError>, Basis) {
    let store = &api.state.store;
    let (check, ping) = if store.is_away() {
        (Err(StoreError::TimedOut), Err(StoreError::TimedOut))
    } else {
        tokio::join!(store.rule_check(api.state.run), store.ping())
    };
    let basis = match &check {
        Ok(check) => Basis::Cluster {
            revision: check.revision,
        },
        Err(error) if error.is_retryable() && (!is_slow(error) || ping.is_err()) => Basis::Node,
        Err(_) => Basis::Unknown,
    };
    (check, basis)
}

/// Whether the check was only slow: a write may still succeed.
const fn is_slow(error: &StoreError) -> bool {
    matches!(error, StoreError::TimedOut | StoreError::Busy | StoreError::Locked(_))
}
