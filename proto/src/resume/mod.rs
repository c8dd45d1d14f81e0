//! Resume tokens: after its first connection a device reconnects without a query, even while the database is away.
//!
//! A token accompanies the credential and never replaces it: its MAC covers the hash of the credential that it was
//! issued to. It holds the device's registry data as of a revision of the revocations. [`Revoked`] holds the changes
//! since then. Rules, and disabling, revoking and rotating a secret, take precedence over it. A token that is not valid
//! is ignored, never refused.
//!
//! Start with [`Verifier`], which verifies a token that a device shows, and [`Grant`], from which the next one is made.
//! [`crate::connect`] has the order of decisions.

use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{
    id::{Credential, DeviceId, Label, SessionId},
    time::WallTime,
};

mod revalidation;
mod revoked;
mod token;

pub use crate::keyring::Keyring as ResumeKeys;
pub use revalidation::{
    Finding, Offered, REVALIDATION_INTERVAL, REVALIDATION_SHARE, REVALIDATIONS_WAITING_MAX, Revalidations,
};
pub use revoked::{Generation, REVOKED_MAX, Revoked};
pub use token::{EPOCH, TOKEN_TEXT_LEN_MAX};

use self::token::Claims;

/// Validity of a token, by default. See docs/design/static-stability.md.
pub const LIFE: Duration = Duration::from_hours(24);
/// Maximum validity that can be configured.
pub const LIFE_MAX: Duration = Duration::from_hours(6 * 24);
/// Additional validity while this node cannot learn of revocations.
pub const GRACE: Duration = Duration::from_hours(8);
/// Tolerated difference between the wall clocks of two nodes at the end of a token's validity.
pub const SKEW: Duration = Duration::from_mins(5);
/// Maximum time by which a token may have been issued in the future, because this node's clock, or another's, was set
/// back. The bound makes tokens of a clock that was years ahead for a moment invalid.
pub const AHEAD_MAX: Duration = Duration::from_hours(24);
/// Time without a confirmation by the database after which this node's revocations are stale.
pub const STALE_AFTER: Duration = Duration::from_secs(5);
/// Part of its validity after which a token is renewed, at the earliest. [`RENEW_SPREAD`] is the maximum delay after
/// that.
const RENEW_FROM: f64 = 0.5;
/// See [`RENEW_FROM`].
const RENEW_SPREAD: f64 = 0.25;

// The previous key is accepted for a whole epoch, so no token outlives it.
const _: () = assert!(EPOCH.as_secs() >= LIFE_MAX.as_secs() + GRACE.as_secs() + SKEW.as_secs());

/// The registry data of an authenticated device, as of a revision. Tokens are made from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub device: DeviceId,
    /// The credential that the device showed, and must show again.
    pub credential: Credential,
    /// The tenant in the registry.
    pub tenant: Label,
    /// The model in the registry, whatever the device claims.
    pub model: Option<Label>,
    /// All revocations up to this revision are included.
    pub generation: Generation,
    /// End of a credential that was replaced; `None` for the current one.
    pub credential_until: Option<WallTime>,
}

/// A new token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Minted {
    pub text: Box<str>,
    /// Time after which the device gets the next token. `None` if a later one would not be valid for longer.
    pub renew_after: Option<Duration>,
}

impl Grant {
    /// Creates a token for the device's current session. It is valid for `life`, at most until the credential ends.
    /// Returns `None` if that time has passed.
    #[must_use]
    pub fn mint(&self, keys: &ResumeKeys, session: SessionId, life: Duration, wall: WallTime) -> Option<Minted> {
        let by_life = wall + life;
        let expires = self.credential_until.map_or(by_life, |until| until.min(by_life));
        if expires <= wall {
            return None;
        }
        let is_final = expires < by_life;
        let text = keys.sign_resume(
            self.credential.hash(),
            &Claims {
                device: self.device,
                issued: wall,
                expires,
                is_final,
                session,
                generation: self.generation,
                tenant: self.tenant.clone(),
                model: self.model.clone(),
            },
            wall,
        );
        let renew_after = (!is_final).then(|| renewal(self.device, life));
        Some(Minted { text, renew_after })
    }

    /// Includes the revocations known by now. Returns `false` if one concerns this device: it gets no further token,
    /// and is looked up when it reconnects.
    #[must_use]
    pub fn refresh(&mut self, revoked: &Revoked) -> bool {
        let is_good = revoked.allows(self.device, self.generation);
        if is_good {
            self.generation = self.generation.max(revoked.known());
        }
        is_good
    }
}

/// Between a half and three quarters of `life`, always the same for one device: a fleet that got its tokens within a
/// second does not renew them within a second.
fn renewal(device: DeviceId, life: Duration) -> Duration {
    let digest = Sha256::new_with_prefix(b"seawall renewal")
        .chain_update(device.as_bytes())
        .finalize();
    let drawn = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    life.mul_f64(RENEW_FROM + RENEW_SPREAD * f64::from(drawn) / f64::from(u32::MAX))
}

/// The data that tokens are verified with.
#[derive(Clone, Copy, Debug)]
pub struct Verifier<'a> {
    pub keys: &'a ResumeKeys,
    pub revoked: &'a Revoked,
    /// Whether the database has not confirmed `revoked` for [`STALE_AFTER`]. Tokens then get their grace.
    pub is_stale: bool,
}

/// A valid token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub grant: Grant,
    /// The session in which it was issued.
    pub session: SessionId,
    /// Whether its validity has ended, and it is accepted by grace.
    pub is_graced: bool,
}

/// Why a token is not valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Signed by another key, for another device or credential, damaged, or issued beyond [`AHEAD_MAX`].
    Invalid,
    /// Its validity has ended. It names the device's tenant at that time.
    Expired(Label),
    /// The device changed in the registry since then, or this node cannot tell. It names the device's tenant at that
    /// time.
    Revoked(Label),
}

impl Rejected {
    /// The tenant that the device had when the token was issued.
    #[must_use]
    pub const fn tenant(&self) -> Option<&Label> {
        match self {
            Self::Invalid => None,
            Self::Expired(tenant) | Self::Revoked(tenant) => Some(tenant),
        }
    }
}

impl Verifier<'_> {
    /// Verifies the token that `device` shows beside `credential`.
    ///
    /// # Errors
    /// The token is not valid.
    pub fn verify(
        &self,
        device: DeviceId,
        credential: &Credential,
        token: &str,
        wall: WallTime,
    ) -> Result<Accepted, Rejected> {
        let claims = self
            .keys
            .verify_resume(credential.hash(), token, wall)
            .filter(|claims| claims.device == device && claims.issued <= wall + AHEAD_MAX)
            .ok_or(Rejected::Invalid)?;
        let is_graced = wall > claims.expires + SKEW;
        let is_over = if claims.is_final {
            wall >= claims.expires
        } else {
            is_graced && (!self.is_stale || wall > claims.expires + GRACE + SKEW)
        };
        if is_over {
            return Err(Rejected::Expired(claims.tenant));
        }
        let mut grant = Grant {
            device,
            credential: *credential,
            tenant: claims.tenant,
            model: claims.model,
            generation: claims.generation,
            credential_until: claims.is_final.then_some(claims.expires),
        };
        if !grant.refresh(self.revoked) {
            return Err(Rejected::Revoked(grant.tenant));
        }
        Ok(Accepted {
            grant,
            session: claims.session,
            is_graced,
        })
    }
}

#[cfg(test)]
mod tests;
