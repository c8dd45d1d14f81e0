//! Resume tokens: after its first connection a device comes back without any query, also while the database is away.
//!
//! A token stands beside the credential, never instead of it: its MAC covers the hash of the credential it was issued to. It
//! says what the registry said of the device, and as of which revision of the revocations; [`Revoked`] says what was changed
//! since. Rules, disabling, revoking and rotating a secret win over it. A token that does not count is ignored, never refused.
//!
//! Start with [`Judge`], which weighs a token that a device shows, and [`Grant`], from which the next one is made. Where in the
//! order of decisions that happens is in [`crate::handshake`].

use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{
    id::{Credential, DeviceId, Label, SessionId},
    time::WallTime,
};

mod drill;
mod revoked;
mod token;

pub use drill::{DRILL_INTERVAL, DRILL_SHARE, DRILLS_WAITING_MAX, Drills, Finding, Offered};
pub use revoked::{Generation, REVOKED_MAX, Revoked};
pub use token::{EPOCH, ResumeKeys, TOKEN_TEXT_LEN_MAX};

use self::token::Claims;

/// How long a token counts by default. overload.md section 3.
pub const LIFE: Duration = Duration::from_hours(24);
/// The longest that it may be made to count.
pub const LIFE_MAX: Duration = Duration::from_hours(6 * 24);
/// How long it counts beyond that, while this node can't learn of revocations. overload.md section 3.
pub const GRACE: Duration = Duration::from_hours(8);
/// How much the wall clocks of two nodes may differ, where a life ends. overload.md section 3, tests.
pub const SKEW: Duration = Duration::from_mins(5);
/// A token may have been issued so long after now: then this node's clock, or another's, has been set back since. No longer, so that
/// a clock that was years ahead for a moment leaves no tokens that count for years.
pub const AHEAD_MAX: Duration = Duration::from_hours(24);
/// The revocations known to this node are stale when the database has not confirmed them for this long.
pub const STALE_AFTER: Duration = Duration::from_secs(5);
/// A token is renewed after this part of its life at the earliest, and [`RENEW_SPREAD`] more at the latest.
const RENEW_FROM: f64 = 0.5;
/// See [`RENEW_FROM`].
const RENEW_SPREAD: f64 = 0.25;

// The key before counts for a whole epoch: no token outlives it.
const _: () = assert!(EPOCH.as_secs() >= LIFE_MAX.as_secs() + GRACE.as_secs() + SKEW.as_secs());

/// What is known of an authenticated device, and as of when. Tokens are made from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub device: DeviceId,
    /// The credential that the device showed, and must show again.
    pub credential: Credential,
    /// The registry's.
    pub tenant: Label,
    /// The registry's, whatever the device says.
    pub model: Option<Label>,
    /// All revocations up to this revision are accounted for.
    pub generation: Generation,
    /// Set where the credential was replaced, and ends then.
    pub credential_until: Option<WallTime>,
}

/// A token, fresh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Minted {
    pub text: Box<str>,
    /// When the device should get the next one; `None` where a later one could not count for longer.
    pub renew_after: Option<Duration>,
}

impl Grant {
    /// A token for the session that this device has now. It counts for `life`, or as long as the credential. `None` where that is over.
    #[must_use]
    pub fn mint(&self, keys: &ResumeKeys, session: SessionId, life: Duration, wall: WallTime) -> Option<Minted> {
        let by_life = wall + life;
        let expires = self.credential_until.map_or(by_life, |until| until.min(by_life));
        if expires <= wall {
            return None;
        }
        let is_final = expires < by_life;
        let text = keys.sign(
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

    /// Takes the revocations of now into account. False where one concerns this device: it gets no other token, and is looked up
    /// when it comes back.
    #[must_use]
    pub fn refresh(&mut self, revoked: &Revoked) -> bool {
        let is_good = revoked.allows(self.device, self.generation);
        if is_good {
            self.generation = self.generation.max(revoked.known());
        }
        is_good
    }
}

/// Between a half and three quarters of `life`, always the same for one device: a fleet that got its tokens within a second
/// does not renew them within a second.
fn renewal(device: DeviceId, life: Duration) -> Duration {
    let digest = Sha256::new_with_prefix(b"seawall renewal")
        .chain_update(device.as_bytes())
        .finalize();
    let drawn = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    life.mul_f64(RENEW_FROM + RENEW_SPREAD * f64::from(drawn) / f64::from(u32::MAX))
}

/// What a node weighs tokens by.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    pub keys: &'a ResumeKeys,
    pub revoked: &'a Revoked,
    /// The database has not confirmed `revoked` for [`STALE_AFTER`]: tokens get their grace.
    pub is_stale: bool,
}

/// A token that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    pub grant: Grant,
    /// The session that it was issued in.
    pub session: SessionId,
    /// Its life is over: it counts by grace.
    pub is_graced: bool,
}

/// Why a token does not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Not ours, or another device's, another credential's, damaged, or from beyond [`AHEAD_MAX`].
    Invalid,
    /// Its life is over. It says that its device was this tenant's.
    Expired(Label),
    /// The device was changed in the registry since, or this node can't tell. It says that its device was this tenant's.
    Revoked(Label),
}

impl Unusable {
    /// The tenant that the registry had the device with, once.
    #[must_use]
    pub const fn tenant(&self) -> Option<&Label> {
        match self {
            Self::Invalid => None,
            Self::Expired(tenant) | Self::Revoked(tenant) => Some(tenant),
        }
    }
}

impl Judge<'_> {
    /// Weighs the token that `device` shows beside `credential`.
    ///
    /// # Errors
    /// It does not count.
    pub fn weigh(
        &self,
        device: DeviceId,
        credential: &Credential,
        token: &str,
        wall: WallTime,
    ) -> Result<Counted, Unusable> {
        let claims = self
            .keys
            .verify(credential.hash(), token, wall)
            .filter(|claims| claims.device == device && claims.issued <= wall + AHEAD_MAX)
            .ok_or(Unusable::Invalid)?;
        let is_graced = wall > claims.expires + SKEW;
        let is_over = if claims.is_final {
            wall >= claims.expires
        } else {
            is_graced && (!self.is_stale || wall > claims.expires + GRACE + SKEW)
        };
        if is_over {
            return Err(Unusable::Expired(claims.tenant));
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
            return Err(Unusable::Revoked(grant.tenant));
        }
        Ok(Counted {
            grant,
            session: claims.session,
            is_graced,
        })
    }
}

#[cfg(test)]
mod tests;
