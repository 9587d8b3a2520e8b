//! Who may be a member.

use millrace_shared::id::NodeId;
use millrace_shared::options::EngineKind;
use millrace_shared::wire::WIRE_VERSION;
use millrace_shared::wire::control::Hello;

use super::Cluster;

impl Cluster {
    /// Why a node cannot be a member.
    pub(super) fn objection(&self, id: NodeId, hello: &Hello) -> Option<String> {
        if let Err(message) = hello.check() {
            return Some(message);
        }
        let ours = self.deployment.engine.as_str();
        if hello.engine != ours
            && [hello.engine.as_str(), ours].contains(&EngineKind::Mock.as_str())
        {
            return Some(format!(
                "the node runs the engine '{}', this cluster '{}': start both with the same --engine",
                hello.engine, ours
            ));
        }
        if hello.wire_version != WIRE_VERSION {
            return Some(format!(
                "the node speaks wire version {}, this coordinator {WIRE_VERSION}: run the same \
                 version on every machine (coordinator {}, node {})",
                hello.wire_version,
                env!("CARGO_PKG_VERSION"),
                hello.version
            ));
        }
        // What torch computes is approximate anyway: each stage's id says what it is computed with.
        if hello.engine == EngineKind::Torch.as_str() {
            return None;
        }
        // Not the node's own former self: it may come back as another build.
        let mut others = self
            .members
            .iter()
            .filter(|(other, m)| **other != id && m.hello.engine == hello.engine);
        let (_, other) =
            others.find(|(_, m)| m.hello.numerics_revision != hello.numerics_revision)?;
        Some(format!(
            "the node's engine computes as '{}', this cluster as '{}': results would depend on \
             where a layer runs; run the same version and engine on every machine",
            hello.numerics_revision, other.hello.numerics_revision
        ))
    }
}
