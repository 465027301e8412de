"""What a guest finds in memory and registers at its first instruction: bzImage, PVH and flat images.

`vmm.hw.boot.image.plan_boot` is the way in. Its result is data (`vmm.hw.boot.plan.BootPlan`); writing it into the
guest's RAM needs the token for that and happens elsewhere, in one place, at start and at each reset.
"""
