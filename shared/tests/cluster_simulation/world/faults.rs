//! What goes wrong.

use std::time::Duration;

use millrace_shared::id::NodeId;
use millrace_shared::membership::CordonReason;

use super::{Fault, Happening, World, name};

impl World {
    pub(super) fn suffer(&mut self, fault: Fault) {
        let now = self.now;
        self.causes += fault.causes();
        match fault {
            Fault::Crash(node, pause) => {
                let n = &mut self.nodes[node];
                n.alive = false;
                n.life += 1;
                n.link += 1;
                n.frozen_until = Duration::ZERO;
                n.forget();
                self.lose_links(node);
                self.at(now + pause, Happening::Restart(node));
            }
            Fault::Host(mask, pause) => {
                let all = (0..self.nodes.len()).filter(|i| mask >> i & 1 == 1);
                all.collect::<Vec<_>>()
                    .into_iter()
                    .for_each(|n| self.suffer(Fault::Crash(n, pause)));
            }
            Fault::Freeze(node, time) => {
                self.nodes[node].frozen_until = self.nodes[node].frozen_until.max(now + time);
            }
            Fault::Cut(a, b, time) => {
                for ends in [(a, b), (b, a)] {
                    let link = self.links.entry(ends).or_default();
                    link.cut_until = link.cut_until.max(now + time);
                }
                self.at(now + time, Happening::Heal(a, b));
            }
            Fault::Slow(node, factor, time) => {
                self.nodes[node].slow = factor;
                self.at(now + time, Happening::Recover(node));
            }
            Fault::FailLoad(node) => self.nodes[node].fail_loads += 1,
            Fault::Hang(node, time) => self.nodes[node].hung_until = now + time,
            Fault::Sick(node, steps) => self.nodes[node].sick_steps += steps,
            Fault::Drain(node) => self.drain(node),
            Fault::Recut(mask) => {
                let chosen: Vec<NodeId> =
                    (0..self.nodes.len()).filter(|i| mask >> i & 1 == 1).map(name).collect();
                self.pipeline.handle_recut(&chosen, now);
                self.advance();
            }
            Fault::Cordon(node, on) => {
                self.pipeline.handle_cordon(name(node), CordonReason::Operator, on, now);
                self.advance();
            }
            Fault::EdgeLost => {
                let epoch = self.pipeline.next_epoch().unwrap_or_else(|| self.pipeline.epoch());
                self.pipeline.handle_edge_lost(epoch, "closed", now);
                self.advance();
            }
            Fault::Delay(time) => {
                self.coordinator_until = self.coordinator_until.max(now + time);
                self.late = true;
            }
        }
    }
}
